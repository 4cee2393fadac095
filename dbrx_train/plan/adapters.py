"""What low-rank adapters change of a plan: the weights beside them are frozen."""

from __future__ import annotations

from dbrx_train.config import RunConfig
from dbrx_train.model.config import DbrxConfig
from dbrx_train.parallel.mesh import MeshShape
from dbrx_train.plan.units import FLOAT32, HasItemsize, fsdp_units

__all__ = ["frozen_memory", "trained"]


def trained(config: RunConfig) -> int:
    """Parameters that train: all, or the adapters' factors."""
    if config.lora.rank is None:
        return config.model.num_params
    of_rank_1 = _factors(config.model)
    return config.model.n_layers * config.lora.rank * sum(of_rank_1[name] for name in config.lora.targets)


def frozen_memory(config: RunConfig, shape: MeshShape, dtype: HasItemsize | None) -> dict[str, int]:
    """Bytes of a rank, by kind, in place of weights, gradients and optimizer state, and of what is gathered.

    Frozen weights lie in ``dtype``, the embedding and the factors in float32; no gradient of a block is made.
    """
    embedding, *blocks, _, head = fsdp_units(config.model, shape, dtype, True, "none")
    itemsize = dtype.itemsize if dtype else FLOAT32
    matrices = sum(unit.padded // unit.ranks for unit in (*blocks, head)) * itemsize
    block = sum(unit.padded for unit in blocks) // config.model.n_layers
    return {
        "frozen_weights": matrices + embedding.padded // embedding.ranks * FLOAT32,
        "shards": trained(config) * 4 * FLOAT32 // shape.shard,
        "gathered": (2 * block + head.padded) * itemsize,
    }


def _factors(model: DbrxConfig) -> dict[str, int]:
    """Elements of both factors at rank 1 of a block's matrices that may have them: rows and columns."""
    d = model.d_model
    qkv = d + 2 * model.n_kv_heads * model.head_dim
    experts = model.num_experts * (model.ffn_hidden_size + d)
    return {"Wqkv": qkv + d, "out_proj": 2 * d, "w1": experts, "v1": experts, "w2": experts}
