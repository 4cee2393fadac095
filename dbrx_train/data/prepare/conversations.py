"""Conversations -> ChatML tokens with a loss mask.

Which fields hold a conversation is told by :mod:`.chat_rows`, and how its turns may look by :mod:`.turns`. In
the tokens, ``<|endoftext|>`` follows each conversation and keeps those of a sample apart (it is never
trained on). A preference is two conversations in a row within one sample, the chosen one first.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from dbrx_train.data.origins import Origin
from dbrx_train.data.prepare.chat_rows import (
    FIELDS,
    WANTED,
    WANTED_PAIR,
    before_answer,
    read_conversation,
    read_pair,
)
from dbrx_train.data.prepare.documents import mended
from dbrx_train.data.prepare.records import Listener, Place, rows
from dbrx_train.data.prepare.sources import Span
from dbrx_train.data.prepare.turns import Turn
from dbrx_train.data.tokenizer import Tokenizer

__all__ = ["ChatFormat", "Conversation", "conversations", "encode"]

_NOT_ANSWERS = "weight or train asks for a turn that is not the assistant's (--loss all trains on it)"


@dataclass(frozen=True)
class ChatFormat:
    """What of a conversation is trained on, and what becomes of one that is longer than a sample."""

    loss: str = "assistant"
    """``assistant``: what the assistant says, with the <|im_end|> after it; ``all``: every turn. Either way
    without turns that are marked as not to be trained on."""
    long: str = "truncate"
    """``truncate``: its beginning is kept; ``drop``: it is left out."""
    preferences: bool = False
    """Lines hold pairs of a chosen and a rejected answer."""

    def __post_init__(self) -> None:
        for key, value, allowed in (
            ("loss", self.loss, ("assistant", "all")),
            ("long", self.long, ("truncate", "drop")),
        ):
            if value not in allowed:
                raise ValueError(f"{key}: {value!r} is not one of {', '.join(allowed)}")
        if self.preferences and self.loss != "assistant":
            raise ValueError("loss: preferences compare answers; it must be 'assistant'")


class Conversation(NamedTuple):
    """What a row gives to a sample."""

    tokens: NDArray[np.uint32]
    loss: NDArray[np.uint8]
    """1 where a token's prediction is trained; as long as ``tokens``."""
    question: str
    """What comes before the first answer, whatever its form; that answer if nothing does."""
    text_bytes: int
    origin: Origin


def conversations(
    span: Span, form: ChatFormat, tokenizer: Tokenizer, seq_len: int, listener: Listener
) -> Iterator[Conversation]:
    """Each conversation (or pair) of the span, of at most ``seq_len`` tokens.

    Reported, by kind: ``empty`` (no answer, or a blank one; left out), ``masked`` (all its answers are marked
    as not to be trained on; left out), ``truncated`` and ``too_long`` (left out: by choice, or as the cut
    leaves no answer), ``identical`` (a pair's answers, or what a cut leaves of them; left out), and fields
    that mean something and are not read, each by its name.

    Raises:
        ValueError: ``FILE:LINE: …`` for a line that holds no conversation.
    """
    for where, row in rows(span, WANTED_PAIR if form.preferences else WANTED, FIELDS, listener):
        sides = (
            read_pair(row, where, listener) if form.preferences else [read_conversation(row, where, listener)]
        )
        if form.loss == "assistant" and any(t.trained and t.role != "assistant" for s in sides for t in s):
            listener.problem(_NOT_ANSWERS, where)
        sides = [[_mended(turn, where, listener) for turn in side] for side in sides]
        shared = _shared_turns(*sides) if form.preferences else 0
        if any(_is_empty(side[shared:]) for side in sides):
            listener.problem("empty", where)
            continue
        if form.preferences and sides[0] == sides[1]:
            listener.problem("identical", where)
            continue
        if not all(_is_trained(side[shared:], form.loss) for side in sides):
            listener.problem("masked", where)
            continue
        encoded = [encode(side, tokenizer, form.loss, shared) for side in sides]
        if parts := _fit(encoded, form, seq_len, where, listener):
            tokens, loss = (np.concatenate(column) for column in zip(*parts, strict=True))
            size = sum(len(turn.content.encode()) for side in sides for turn in side)
            yield Conversation(tokens, loss, _question(sides[0]), size, where)


def encode(
    turns: Sequence[Turn], tokenizer: Tokenizer, loss: str = "assistant", skip: int = 0
) -> tuple[NDArray[np.uint32], NDArray[np.uint8]]:
    """Ids of a conversation in ChatML with ``<|endoftext|>`` after it, and its loss mask; [tokens] each.

    The ids are those of ``Tokenizer.chat``, except where an answer begins with blanks: it is tokenized apart
    from its header, as the model that writes it begins after the header. ``loss`` as in ``ChatFormat``;
    turns before ``skip``, and those that are marked so, are never trained on.
    """
    ids, mask = list[int](), list[int]()

    def add(more: list[int], trained: bool) -> None:
        ids.extend(more)
        mask.extend([int(trained)] * len(more))

    for number, turn in enumerate(turns):
        allowed = number >= skip and turn.trained is not False
        every = loss == "all" and allowed
        add(tokenizer.encode("\n") if number else [], every)
        add([tokenizer.im_start_id], every)
        if turn.role == "assistant":
            add(tokenizer.encode("assistant\n"), every)
            add([*tokenizer.encode(turn.content), tokenizer.im_end_id], allowed)
        else:
            add([*tokenizer.encode(f"{turn.role}\n{turn.content}"), tokenizer.im_end_id], every)
    add([tokenizer.eos_id], False)
    return np.array(ids, np.uint32), np.array(mask, np.uint8)


def _fit(
    sides: list[tuple[NDArray[np.uint32], NDArray[np.uint8]]],
    form: ChatFormat,
    seq_len: int,
    where: Place,
    listener: Listener,
) -> list[tuple[NDArray[np.uint32], NDArray[np.uint8]]]:
    """The sides cut to ``seq_len`` tokens together; nothing if they are to be left out."""
    sizes = [len(ids) for ids, _ in sides]
    if sum(sizes) <= seq_len:
        return sides
    if form.long == "truncate":
        fair = seq_len // len(sides)
        spare = sum(max(0, fair - size) for size in sizes)
        cut = [_cut(*side, fair + spare) for side in sides]
        trained = [ids[loss == 1] for ids, loss in cut]
        if form.preferences and len(trained[0]) and np.array_equal(*trained):
            listener.problem("identical", where)
            return []
        if all(map(len, trained)):
            listener.problem("truncated", where)
            return cut
    listener.problem("too_long", where)
    return []


def _cut(
    ids: NDArray[np.uint32], loss: NDArray[np.uint8], size: int
) -> tuple[NDArray[np.uint32], NDArray[np.uint8]]:
    """The first tokens, still with the end-of-text that keeps conversations apart."""
    if len(ids) <= size:
        return ids, loss
    return np.append(ids[: size - 1], ids[-1:]), np.append(loss[: size - 1], loss[-1:])


def _mended(turn: Turn, where: Place, listener: Listener) -> Turn:
    content = mended(turn.content, where, listener)
    return turn if content is turn.content else replace(turn, content=content)


def _shared_turns(chosen: list[Turn], rejected: list[Turn]) -> int:
    """Turns that both sides begin with, up to the answers in which they differ."""
    equal = (a == b for a, b in zip(chosen, rejected, strict=False))
    shared = next((number for number, same in enumerate(equal) if not same), min(len(chosen), len(rejected)))
    return min(shared, len(chosen) - 1, len(rejected) - 1)


def _is_empty(turns: list[Turn]) -> bool:
    answers = [turn for turn in turns if turn.role == "assistant"]
    return not answers or any(turn.trained is not False and not turn.content.strip() for turn in answers)


def _is_trained(turns: list[Turn], loss: str) -> bool:
    return any(turn.trained is not False and (loss == "all" or turn.role == "assistant") for turn in turns)


def _question(turns: list[Turn]) -> str:
    """An answer with nothing before it stands for itself, or all such lines would share a split."""
    asked = before_answer(turns) or turns[:1]
    return json.dumps([{"role": turn.role, "content": turn.content} for turn in asked])
