"""What a mesh costs a rank: bytes that it sends in a step, bytes that it holds (``memory.py``).

Bytes sent are those of the usual ring algorithms: of a tensor of B bytes, gathered from n ranks or scattered
over them, each rank sends (n - 1) / n B; all-reduced over them, twice that. FSDP pads a parameter's rows to a
multiple of the ranks.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch

from dbrx_train.model.config import DbrxConfig
from dbrx_train.parallel.mesh import MeshShape
from dbrx_train.plan.memory import Memory, memory
from dbrx_train.plan.units import FLOAT32, fsdp_units

__all__ = ["Memory", "Traffic", "memory", "traffic"]

_INT64 = 8


@dataclass(frozen=True)
class Traffic:
    """Bytes that one rank sends in an optimizer step."""

    gathered: int
    """Parameters, before they are used."""
    scattered: int
    """Gradients, within a group."""
    reduced: int
    """Gradients, between replicas."""
    exchanged: float
    """Tokens to experts on other ranks and back, where experts are equally loaded; zero without these."""


def traffic(
    config: DbrxConfig,
    shape: MeshShape,
    *,
    microbatches: int,
    tokens: int,
    param_dtype: torch.dtype | None = None,
    reshard_after_forward: bool = True,
    activation_checkpointing: str = "none",
) -> Traffic:
    """Of a model that ``parallelize`` spread, for a rank's ``tokens`` a microbatch.

    Norms of gradients and counts of tokens, a few bytes each, are left out.
    """
    units = fsdp_units(config, shape, param_dtype, reshard_after_forward, activation_checkpointing)
    gathered = sum(_ring(u.padded * u.itemsize, u.ranks) * u.gathers for u in units)
    scattered = sum(_ring(u.padded * FLOAT32, u.ranks) for u in units)
    reduced = sum(2 * _ring(u.padded // u.ranks * FLOAT32, shape.replicate) for u in units)
    again = activation_checkpointing in ("full", "selective")
    width = config.d_model * (param_dtype or torch.float32).itemsize
    rows = tokens * config.top_k * (shape.expert - 1) / shape.expert
    # Two ways, forward and backward; both again if the block is computed again. Counts go ahead of them.
    exchange = rows * width * (6 if again else 4)
    counts = _INT64 * config.num_experts * (shape.expert - 1) / shape.expert * (2 if again else 1)
    return Traffic(
        gathered=gathered * microbatches,
        scattered=scattered * microbatches,
        reduced=reduced,
        exchanged=(exchange + counts) * config.n_layers * microbatches,
    )


def _ring(size: int, ranks: int) -> int:
    return size * (ranks - 1) // ranks
