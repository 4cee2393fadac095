"""Sampling from a model, one token at a time, with a key/value cache."""

from __future__ import annotations

from collections.abc import Collection, Iterator

import torch
from torch import Tensor

from dbrx_train.model.attention import KVCache
from dbrx_train.model.decoder import Dbrx

__all__ = ["KVCache", "generate", "sample"]


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
    prompt, limit = input_ids.shape[1], model.config.max_seq_len
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
        token = torch.where(stopped, token, sample(logits, temperature, top_p, generator))
        yield token
        stopped = stopped | torch.isin(token, stops)
        if stopped.all():
            return
        input_ids = token[:, None]


def sample(
    logits: Tensor, temperature: float = 0.0, top_p: float = 1.0, generator: torch.Generator | None = None
) -> Tensor:
    """Draw a token id per row of logits [B, V] -> [B].

    top_p keeps the smallest set of likeliest tokens whose probability reaches it (arXiv 1904.09751); with 0,
    the likeliest token alone.
    """
    if temperature == 0:
        return logits.argmax(-1)
    probs, ids = (logits.float() / temperature).softmax(-1).sort(-1, descending=True)
    ahead = probs.cumsum(-1) - probs
    surplus = ahead >= top_p
    surplus[..., 0] = False
    probs = probs.masked_fill(surplus, 0.0)
    return ids.gather(-1, torch.multinomial(probs, 1, generator=generator)).squeeze(-1)
