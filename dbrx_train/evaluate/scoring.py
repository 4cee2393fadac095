"""Log-probabilities of continuations: each context is read once for all of its continuations, sequences are
batched by length, and logits are made of those tokens alone that are asked for.

Shape suffixes: B rows, S tokens, N tokens that are asked for, V vocabulary.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from dbrx_train.model.config import LONGEST_MASK
from dbrx_train.model.decoder import Dbrx, Layout

__all__ = ["Row", "Score", "batches", "rows_of", "score"]

_PADDING = -1
_LOGITS_AT_ONCE = 256
Pair = tuple[list[int], list[int]]


@dataclass(frozen=True)
class Score:
    """Of one continuation."""

    log_prob: float
    """Natural logarithm of its probability after its context."""
    tokens: int
    greedy: tuple[int, ...]
    """The likeliest token at each of its places, given those before as they are."""


@dataclass(frozen=True)
class Row:
    """Sequences that begin alike, one after another in a row: what they share, then each one's rest."""

    key: tuple[int, int]
    """Whose they are: the caller's number, and the number of the first of them."""
    tokens: list[int]
    branches: list[int]
    """Of each token: 0 of what is shared, then 1, 2, ..."""
    positions: list[int]
    wanted: list[list[tuple[int, int]]]
    """Of each sequence: at which token of the row what is to come."""

    @property
    def is_plain(self) -> bool:
        """Whether it is a sequence like any other."""
        return not self.branches[-1]


def rows_of(owner: int, pairs: Sequence[Pair]) -> list[Row]:
    """The rows that score ``pairs`` of a context, of one token at least, and a continuation."""
    # The last token of all is only predicted.
    read = [context + continuation[:-1] for context, continuation in pairs]
    shared = _shared(read)
    length = shared + sum(len(tokens) - shared for tokens in read)
    if 2 * shared < min(map(len, read)) or length > LONGEST_MASK:
        return [_row((owner, i), [pair]) for i, pair in enumerate(pairs)]
    return [_row((owner, 0), pairs)]


def _shared(sequences: Sequence[list[int]]) -> int:
    """How many tokens they all begin with."""
    first, last = min(sequences), max(sequences)  # in the order of a dictionary, these differ the soonest
    return next((i for i, (a, b) in enumerate(zip(first, last, strict=False)) if a != b), len(first))


def _row(key: tuple[int, int], pairs: Sequence[Pair]) -> Row:
    read = [context + continuation[:-1] for context, continuation in pairs]
    shared = _shared(read)
    tokens, branches, positions = read[0][:shared], [0] * shared, list(range(shared))
    wanted = []
    for number, (mine, (context, continuation)) in enumerate(zip(read, pairs, strict=True), 1):
        begin = len(tokens) - shared
        places = range(len(context) - 1, len(mine))
        at = [place if place < shared else begin + place for place in places]
        wanted.append(list(zip(at, continuation, strict=True)))
        tokens += mine[shared:]
        branches += [number] * (len(mine) - shared)
        positions += range(shared, len(mine))
    return Row(key, tokens, branches, positions, wanted)


def batches(rows: Sequence[Row], most_tokens: int) -> list[list[Row]]:
    """Rows of like length, the longest first, in batches of at most so many tokens, padding included, and a
    quarter as many logits; but at least a row each."""
    found: list[list[Row]] = []
    logits = 0
    for row in sorted(rows, key=lambda row: (row.is_plain, -len(row.tokens))):
        asked = sum(map(len, row.wanted))
        fits = found and len(found[-1][0].tokens) * (len(found[-1]) + 1) <= most_tokens
        if fits and logits + asked <= most_tokens // 4 and found[-1][0].is_plain == row.is_plain:
            found[-1].append(row)
            logits += asked
        else:
            found.append([row])
            logits = asked
    return found


@torch.no_grad()
def score(model: Dbrx, batch: Sequence[Row], device: torch.device) -> Iterator[tuple[tuple[int, int], Score]]:
    """The scores of a batch's continuations, under their numbers; one forward pass."""
    ids = _padded([row.tokens for row in batch], 0, device)
    width = ids.shape[1]
    places = sorted(
        {n * width + at for n, row in enumerate(batch) for pairs in row.wanted for at, _ in pairs}
    )
    logits = model(ids, layout=_layout(batch, device), logits_at=torch.tensor(places, device=device)).logits
    number = {place: i for i, place in enumerate(places)}
    asked = [
        (number[n * width + at], token)
        for n, row in enumerate(batch)
        for pairs in row.wanted
        for at, token in pairs
    ]
    log_probs, greedy = _of_tokens(logits, asked)
    begin = 0
    for row in batch:
        owner, first = row.key
        for i, pairs in enumerate(row.wanted):
            end = begin + len(pairs)
            yield (owner, first + i), Score(sum(log_probs[begin:end]), len(pairs), tuple(greedy[begin:end]))
            begin = end


def _of_tokens(logits_NV: Tensor, asked: Sequence[tuple[int, int]]) -> tuple[list[float], list[int]]:
    """Of each place and token: the token's log-probability there, and the likeliest token."""
    rows, tokens = torch.tensor(asked, device=logits_NV.device).unbind(1)
    sums, best = [], []
    for begin in range(0, len(logits_NV), _LOGITS_AT_ONCE):
        part = logits_NV[begin : begin + _LOGITS_AT_ONCE]
        sums.append(part.float().logsumexp(-1))
        best.append(part.argmax(-1))
    log_probs = logits_NV[rows, tokens].double() - torch.cat(sums)[rows]
    return log_probs.tolist(), torch.cat(best)[rows].tolist()


def _layout(batch: Sequence[Row], device: torch.device) -> Layout | None:
    if all(row.is_plain for row in batch):  # padding comes last, where nothing sees it
        return None
    branch = _padded([row.branches for row in batch], _PADDING, device)
    positions = _padded([row.positions for row in batch], 0, device)
    visible = (branch[:, None, :] == branch[:, :, None]) | (branch[:, None, :] == 0)
    return Layout(positions, visible.tril())


def _padded(rows: Sequence[list[int]], value: int, device: torch.device) -> Tensor:
    width = max(map(len, rows))
    return torch.tensor([row + [value] * (width - len(row)) for row in rows], device=device)
