"""What a mesh costs a rank: bytes that it sends in a step, bytes that it holds.

Bytes sent are those of the usual ring algorithms: of a tensor of B bytes, gathered from n ranks or scattered
over them, each rank sends (n - 1) / n B; all-reduced over them, twice that. FSDP pads a parameter's rows to a
multiple of the ranks.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch

from dbrx_train.model.config import DbrxConfig
from dbrx_train.model.decoder import Dbrx
from dbrx_train.parallel.mesh import MeshShape

__all__ = ["Memory", "Traffic", "memory", "traffic"]

_FLOAT32 = 4
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


@dataclass(frozen=True)
class Memory:
    """Bytes that one rank holds."""

    shards: int
    """Parameters, gradients and AdamW's state, all float32."""
    gathered: int
    """Two blocks' parameters and one block's gradients, the head with its gradient."""
    activations: int
    """What the backward pass of a microbatch waits for, experts equally loaded, and one block's at work."""

    @property
    def total(self) -> int:
        return self.shards + self.gathered + self.activations


@dataclass(frozen=True)
class _Unit:
    """Parameters that are gathered together."""

    padded: int
    """Elements, with padding."""
    ranks: int
    itemsize: int
    gathers: int
    """How often, in a forward and a backward pass."""


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
    units = _units(config, shape, param_dtype, reshard_after_forward, activation_checkpointing)
    gathered = sum(_ring(u.padded * u.itemsize, u.ranks) * u.gathers for u in units)
    scattered = sum(_ring(u.padded * _FLOAT32, u.ranks) for u in units)
    reduced = sum(2 * _ring(u.padded // u.ranks * _FLOAT32, shape.replicate) for u in units)
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


def memory(
    config: DbrxConfig,
    shape: MeshShape,
    *,
    tokens: int,
    param_dtype: torch.dtype | None = None,
    activation_checkpointing: str = "none",
) -> Memory:
    """Of a model that ``parallelize`` spread, for a rank's ``tokens`` a microbatch; an estimate.

    Left out are what the allocator cannot use, the communication library's buffers, and attention's masks.
    """
    units = _units(config, shape, param_dtype, True, "none")
    itemsize = (param_dtype or torch.float32).itemsize
    _, *blocks, _, head = units
    block = sum(u.padded for u in blocks) // config.n_layers
    # The gradient is scattered in float32.
    gathered = block * (2 * itemsize + itemsize + _FLOAT32) + head.padded * (head.itemsize + _FLOAT32)
    kept, most = _activations(config, activation_checkpointing, itemsize, exchanged=shape.expert > 1)
    logits = config.loss_chunk_size * config.vocab_size * (_FLOAT32 + itemsize)
    return Memory(
        shards=sum(u.padded // u.ranks for u in units) * 4 * _FLOAT32,
        gathered=gathered,
        activations=tokens * (kept * config.n_layers + max(most - kept, 0)) + logits,
    )


def _activations(config: DbrxConfig, what: str, itemsize: int, exchanged: bool = False) -> tuple[int, int]:
    """Bytes per token that a block keeps, and that it keeps while its backward pass runs.

    ``exchanged``: tokens travel to experts on other ranks; what comes back is kept too, to be weighted.
    """
    d, kv = config.d_model, config.n_kv_heads * config.head_dim
    stream = 2 * d * _FLOAT32  # before attention and before the experts
    # Normalised input; q, k, v before and after clamping and rotation, heads repeated; attention's output
    attention = itemsize * (2 * d + 2 * (d + 2 * kv) + 3 * d)
    experts = itemsize * config.top_k * ((2 if exchanged else 1) * d + 2 * config.ffn_hidden_size)
    experts += itemsize * d  # the experts' input
    everything = stream + attention + experts
    products = itemsize * (2 * d + 2 * kv + config.top_k * (d + 2 * config.ffn_hidden_size))
    kept = {
        "none": everything,
        "full": d * _FLOAT32,
        "selective": d * _FLOAT32 + products,
        "norm_attn_norm": stream + experts,
    }
    return kept[what], everything


def _units(
    config: DbrxConfig, shape: MeshShape, param_dtype: torch.dtype | None, reshard: bool, recomputed: str
) -> list[_Unit]:
    """As ``parallelize`` makes them: embedding, parts of blocks, final norm, head."""
    with torch.device("meta"):
        model = Dbrx(config)
    lower = (param_dtype or torch.float32).itemsize
    twice, outer = (2 if reshard else 1), shape.shard // shape.expert
    # What lies inside a block that is computed again is gathered for that too.
    inside = 3 if recomputed in ("full", "selective") else 2
    units = [_Unit(_padded(model.transformer.wte, shape.shard), shape.shard, _FLOAT32, 1)]
    for block in model.transformer.blocks:
        exact, experts = 0, 0
        if param_dtype is not None:
            parts = [block.norm_attn_norm.norm_1, block.norm_attn_norm.norm_2, block.ffn.router]
            exact = sum(_padded(part, shape.shard) for part in parts if part is not None)
            units.append(_Unit(exact, shape.shard, _FLOAT32, 1))
        if shape.expert > 1:
            experts = _padded(block.ffn.experts, shape.shard)
            again = inside if reshard else 1
            units.append(_Unit(experts // shape.expert, outer, lower, again))
        units.append(_Unit(_padded(block, shape.shard) - exact - experts, shape.shard, lower, twice))
    units.append(_Unit(_padded(model.transformer.norm_f, shape.shard), shape.shard, _FLOAT32, 2))
    units.append(_Unit(_padded(model.lm_head, shape.shard), shape.shard, lower, 1))
    return units


def _padded(module: torch.nn.Module, ranks: int) -> int:
    return sum(-(-p.shape[0] // ranks) * ranks * p[0].numel() for p in module.parameters())


def _ring(size: int, ranks: int) -> int:
    return size * (ranks - 1) // ranks
