"""Texts that a model writes after many prompts, on one process or on all ranks that hold it."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import torch
import torch.distributed as dist

from dbrx_train.model.continuous_batching import ContinuousBatch, Request, complete
from dbrx_train.model.decoder import Dbrx
from dbrx_train.parallel.gather import gather_objects

__all__ = ["written"]

_CACHED = 4  # times the tokens of a forward pass
_AT_ONCE = 32  # on a CPU, more rows a step are hardly quicker


def written(
    model: Dbrx, requests: Sequence[tuple[int, Request]], batch_tokens: int
) -> Iterator[tuple[int, list[int]]]:
    """The new tokens of each numbered request, as they are done; on several ranks, at the end and on all.

    ``batch_tokens``: of a forward pass. Prompts and answers that are at work at a time have room for a few
    times as many, or for one.
    """
    if not requests:
        return
    capacity = max(len(request.prompt) + request.max_new_tokens for _, request in requests)
    slots = max(1, min(len(requests), _AT_ONCE, _CACHED * batch_tokens // capacity))
    batch = ContinuousBatch(model, slots, max(2, capacity))
    ranks = dist.get_world_size() if dist.is_initialized() else 1
    if ranks == 1:
        yield from complete(batch, requests)
    else:
        mine = list(complete(batch, requests[dist.get_rank() :: ranks], _any_rank))
        for each in gather_objects(mine):
            yield from each


def _any_rank(mine: bool) -> bool:
    flag = torch.tensor(int(mine), device="cuda" if dist.get_backend() == "nccl" else "cpu")
    dist.all_reduce(flag, dist.ReduceOp.MAX)
    return bool(flag)
