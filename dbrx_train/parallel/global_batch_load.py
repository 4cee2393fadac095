"""How the whole batch loads the experts, for a balance loss that looks further than a rank's microbatch."""

from __future__ import annotations

import torch
import torch.distributed as dist
from torch import Tensor

__all__ = ["GlobalBatchLoad"]


class GlobalBatchLoad:
    """Tokens per expert of a step's global batch so far (arXiv 2501.11873, section 3).

    Over all ranks, and over the microbatches since ``begin``: a microbatch cannot know of those that follow.
    Give it to a model as ``model.batch_load``, and call ``begin`` before each step.
    """

    def __init__(self) -> None:
        self._sum: Tensor | None = None

    def begin(self) -> None:
        """A new step: nothing has been counted."""
        self._sum = None

    @torch.no_grad()
    def __call__(self, tokens_per_expert: Tensor) -> Tensor:
        """[L, E] of a rank's microbatch -> [L, E] of the global batch so far, the same on every rank."""
        counts = tokens_per_expert.clone()
        if dist.is_initialized():
            dist.all_reduce(counts)
        self._sum = counts if self._sum is None else self._sum + counts
        return self._sum
