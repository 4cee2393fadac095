"""The units that FSDP makes of a model: which parameters are gathered and scattered together."""

from __future__ import annotations

from dataclasses import dataclass

import torch

from dbrx_train.model.config import DbrxConfig
from dbrx_train.model.decoder import Dbrx
from dbrx_train.parallel.mesh import MeshShape

__all__ = ["FLOAT32", "Unit", "fsdp_units"]

FLOAT32 = 4
"""Bytes."""


@dataclass(frozen=True)
class Unit:
    """Parameters that are gathered together."""

    padded: int
    """Elements, with padding."""
    ranks: int
    itemsize: int
    gathers: int
    """How often, in a forward and a backward pass."""


def fsdp_units(
    config: DbrxConfig, shape: MeshShape, param_dtype: torch.dtype | None, reshard: bool, recomputed: str
) -> list[Unit]:
    """As ``parallelize`` makes them: embedding, parts of blocks, final norm, head."""
    with torch.device("meta"):
        model = Dbrx(config)
    lower = (param_dtype or torch.float32).itemsize
    twice, outer = (2 if reshard else 1), shape.shard // shape.expert
    # What lies inside a block that is computed again is gathered for that too.
    inside = 3 if recomputed in ("full", "selective") else 2
    units = [Unit(_padded(model.transformer.wte, shape.shard), shape.shard, FLOAT32, 1)]
    for block in model.transformer.blocks:
        exact, experts = 0, 0
        if param_dtype is not None:
            parts = [block.norm_attn_norm.norm_1, block.norm_attn_norm.norm_2, block.ffn.router]
            exact = sum(_padded(part, shape.shard) for part in parts if part is not None)
            units.append(Unit(exact, shape.shard, FLOAT32, 1))
        if shape.expert > 1:
            experts = _padded(block.ffn.experts, shape.shard)
            again = inside if reshard else 1
            units.append(Unit(experts // shape.expert, outer, lower, again))
        units.append(Unit(_padded(block, shape.shard) - exact - experts, shape.shard, lower, twice))
    units.append(Unit(_padded(model.transformer.norm_f, shape.shard), shape.shard, FLOAT32, 2))
    units.append(Unit(_padded(model.lm_head, shape.shard), shape.shard, lower, 1))
    return units


def _padded(module: torch.nn.Module, ranks: int) -> int:
    return sum(-(-p.shape[0] // ranks) * ranks * p[0].numel() for p in module.parameters())
