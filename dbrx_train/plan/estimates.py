"""What a mesh costs a rank: bytes that it sends in a step, bytes that it holds.

FSDP pads a parameter's rows to a multiple of the ranks.
"""

from __future__ import annotations

from dataclasses import dataclass

from dbrx_train.model.config import DbrxConfig
from dbrx_train.parallel.mesh import MeshShape
from dbrx_train.plan.collectives import KINDS, collectives
from dbrx_train.plan.units import FLOAT32, HasItemsize, fsdp_units

__all__ = ["Memory", "Traffic", "memory", "traffic"]


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


def traffic(
    config: DbrxConfig,
    shape: MeshShape,
    *,
    microbatches: int,
    tokens: int,
    param_dtype: HasItemsize | None = None,
    reshard_after_forward: bool = True,
    activation_checkpointing: str = "none",
) -> Traffic:
    """Of a model that ``parallelize`` spread, for a rank's ``tokens`` a microbatch.

    Norms of gradients and counts of tokens, a few bytes each, are left out.
    """
    sent = dict.fromkeys(KINDS, 0.0)
    for each in collectives(
        config,
        shape,
        microbatches=microbatches,
        tokens=tokens,
        param_dtype=param_dtype,
        reshard_after_forward=reshard_after_forward,
        activation_checkpointing=activation_checkpointing,
    ):
        sent[each.kind] += each.sent
    return Traffic(
        gathered=round(sent["gathered"]),
        scattered=round(sent["scattered"]),
        reduced=round(sent["reduced"]),
        exchanged=sent["exchanged"],
    )


def memory(
    config: DbrxConfig,
    shape: MeshShape,
    *,
    tokens: int,
    param_dtype: HasItemsize | None = None,
    activation_checkpointing: str = "none",
) -> Memory:
    """Of a model that ``parallelize`` spread, for a rank's ``tokens`` a microbatch; an estimate.

    Left out are what the allocator cannot use, the communication library's buffers, and attention's masks.
    """
    parts = fsdp_units(config, shape, param_dtype, True, "none")
    itemsize = param_dtype.itemsize if param_dtype else FLOAT32
    _, *blocks, _, head = parts
    block = sum(u.padded for u in blocks) // config.n_layers
    # The gradient is scattered in float32.
    gathered = block * (2 * itemsize + itemsize + FLOAT32) + head.padded * (head.itemsize + FLOAT32)
    kept, most = _activations(config, activation_checkpointing, itemsize, exchanged=shape.expert > 1)
    logits = config.loss_chunk_size * config.vocab_size * (FLOAT32 + itemsize)
    return Memory(
        shards=sum(u.padded // u.ranks for u in parts) * 4 * FLOAT32,
        gathered=gathered,
        activations=tokens * (kept * config.n_layers + max(most - kept, 0)) + logits,
    )


def _activations(config: DbrxConfig, what: str, itemsize: int, exchanged: bool = False) -> tuple[int, int]:
    """Bytes per token that a block keeps, and that it keeps while its backward pass runs.

    ``exchanged``: tokens travel to experts on other ranks; what comes back is kept too, to be weighted.
    """
    d, kv = config.d_model, config.n_kv_heads * config.head_dim
    stream = 2 * d * FLOAT32  # before attention and before the experts
    # Normalised input; q, k, v before and after clamping and rotation, heads repeated; attention's output
    attention = itemsize * (2 * d + 2 * (d + 2 * kv) + 3 * d)
    experts = itemsize * config.top_k * ((2 if exchanged else 1) * d + 2 * config.ffn_hidden_size)
    experts += itemsize * d  # the experts' input
    everything = stream + attention + experts
    products = itemsize * (2 * d + 2 * kv + config.top_k * (d + 2 * config.ffn_hidden_size))
    kept = {
        "none": everything,
        "full": d * FLOAT32,
        "selective": d * FLOAT32 + products,
        "norm_attn_norm": stream + experts,
    }
    return kept[what], everything
