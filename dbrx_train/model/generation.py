"""Sampling from a model, one token at a time, with a key/value cache."""

from __future__ import annotations

from collections.abc import Collection, Iterator, Sequence

import torch
from torch import Tensor

from dbrx_train.model.attention import KVCache
from dbrx_train.model.decoder import Dbrx

__all__ = ["KVCache", "check_options", "generate", "sample"]


def generate(
    model: Dbrx,
    input_ids: Tensor,
    max_new_tokens: int,
    temperature: float = 0.0,
    top_p: float = 1.0,
    stop_ids: Collection[int] = (),
    generator: torch.Generator | None = None,
) -> Iterator[Tensor]:
    """Continue input_ids [B, S]; yields the next token of every row, [B], as soon as it is known.

    Ends once every row has met a stop id (which is yielded, and repeated while other rows go on) or after
    max_new_tokens. temperature 0 takes the likeliest token. Prompts of a batch are equally long.
    Raises ValueError at once for options or lengths that cannot work.
    """
    check_options(input_ids.shape[1], max_new_tokens, model.config.max_seq_len, temperature, top_p)
    return _generate(model, input_ids, max_new_tokens, temperature, top_p, stop_ids, generator)


@torch.no_grad()
def _generate(
    model: Dbrx,
    input_ids: Tensor,
    max_new_tokens: int,
    temperature: float,
    top_p: float,
    stop_ids: Collection[int],
    generator: torch.Generator | None,
) -> Iterator[Tensor]:
    cache = KVCache(model.config.n_layers, input_ids.shape[1] + max_new_tokens)
    stops = torch.tensor(list(stop_ids), dtype=input_ids.dtype, device=input_ids.device)
    stopped = torch.zeros(input_ids.shape[0], dtype=torch.bool, device=input_ids.device)
    token = input_ids.new_empty(input_ids.shape[0])
    for _ in range(max_new_tokens):
        logits = model(input_ids, cache=cache).logits[:, -1]
        device = generator.device if generator else None
        draws = torch.rand(len(token), dtype=torch.float64, generator=generator, device=device).tolist()
        drawn = sample(logits, [temperature] * len(token), [top_p] * len(token), draws)
        token = torch.where(stopped, token, drawn)
        yield token
        stopped = stopped | torch.isin(token, stops)
        if stopped.all():
            return
        input_ids = token[:, None]


def check_options(prompt: int, max_new_tokens: int, limit: int, temperature: float, top_p: float) -> None:
    """Raise ValueError for options, or lengths of prompt and continuation, that cannot work within ``limit``
    tokens."""
    if not 1 <= prompt < limit:
        raise ValueError(
            f"input_ids: {prompt} tokens; must be at least 1, and at most {limit - 1} to leave room in "
            f"max_seq_len {limit}"
        )
    if max_new_tokens < 1:
        raise ValueError(f"max_new_tokens: {max_new_tokens} is too small; must be at least 1")
    if prompt + max_new_tokens > limit:
        raise ValueError(
            f"max_new_tokens: {prompt} prompt and {max_new_tokens} new tokens exceed max_seq_len {limit}; "
            f"must be at most {limit - prompt}"
        )
    if temperature < 0:
        raise ValueError(f"temperature: {temperature} is negative; must be 0 (greedy) or more")
    if not 0 <= top_p <= 1:
        raise ValueError(f"top_p: {top_p} is out of range; must be at least 0 and at most 1")


def sample(
    logits: Tensor, temperature: Sequence[float], top_p: Sequence[float], draws: Sequence[float]
) -> Tensor:
    """Choose a token id per row of logits [B, V] -> [B], each by its row's options.

    draws: uniform numbers in [0, 1), of which each says alone what its row becomes: the token at which the
    cumulative probability passes it. top_p keeps the smallest set of likeliest tokens whose probability
    reaches it (arXiv 1904.09751); with 0, the likeliest token alone. temperature 0 takes that, too.
    """
    ids = logits.argmax(-1)
    for nucleus in (False, True):
        rows = [i for i, t in enumerate(temperature) if t > 0 and (top_p[i] < 1) == nucleus]
        if rows:
            heat, share, draw = (
                torch.tensor([values[i] for i in rows], dtype=torch.float64, device=logits.device)[:, None]
                for values in (temperature, top_p, draws)
            )
            probs = (logits[rows].double() / heat).softmax(-1)
            ids[rows] = _of_nucleus(probs, share, draw) if nucleus else _at(probs, draw)
    return ids


def _of_nucleus(probs: Tensor, top_p: Tensor, draw: Tensor) -> Tensor:
    probs, ids = probs.sort(dim=-1, descending=True, stable=True)
    surplus = probs.cumsum(-1) - probs >= top_p
    surplus[:, 0] = False
    return ids.gather(-1, _at(probs.masked_fill(surplus, 0.0), draw)[:, None])[:, 0]


def _at(probs: Tensor, draw: Tensor) -> Tensor:
    """Where the cumulative sum of probs [B, V], whatever it comes to, passes draw [B, 1] -> [B]."""
    total = probs.cumsum(-1)
    return torch.searchsorted(total, draw * total[:, -1:], right=True)[:, 0].clamp(max=probs.shape[1] - 1)
