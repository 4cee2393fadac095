"""What low-rank adapters change of a plan: the weights beside them are frozen."""

from __future__ import annotations

from dbrx_train.config import RunConfig
from dbrx_train.model.config import DbrxConfig
from dbrx_train.parallel.mesh import MeshShape
from dbrx_train.plan.memory import Memory
from dbrx_train.plan.units import FLOAT32, HasItemsize, fsdp_units

__all__ = ["frozen_memory", "trained"]


def trained(config: RunConfig) -> int:
    """Parameters that train: all, or the adapters' factors."""
    if config.lora.rank is None:
        return config.model.num_params
    of_rank_1 = _factors(config.model)
    return config.model.n_layers * config.lora.rank * sum(of_rank_1[name] for name in config.lora.targets)


def frozen_memory(config: RunConfig, shape: MeshShape, dtype: HasItemsize | None, whole: Memory) -> Memory:
    """Memory of a rank, where ``whole`` is that of training all weights; a bound.

    Frozen weights lie in ``dtype``, embedding and factors in float32. The factors alone have gradients
    and optimizer state; of blocks, head and embedding no gradient is made, and of the head only logits are.
    """
    embedding, *blocks, _, head = fsdp_units(config.model, shape, dtype, True)
    itemsize = dtype.itemsize if dtype else FLOAT32
    frozen = sum(unit.padded // unit.ranks for unit in (*blocks, head)) * itemsize
    frozen += embedding.padded // embedding.ranks * FLOAT32
    factors = trained(config) * FLOAT32 // shape.shard
    head_gradients = head.padded * (FLOAT32 + (itemsize if itemsize < FLOAT32 else 0))
    found = {}
    for moment, kinds in whole.moments.items():
        state = kinds["optimizer state"] // kinds["parameters"] * factors
        own = {"parameters": frozen + factors, "optimizer state": state, "gradients": factors}
        logits = kinds["head"] - head_gradients if moment == "head forward" else 0
        found[moment] = kinds | own | {"scattered": 0, "head": logits}
    del found["embedding backward"]
    return Memory(found)


def _factors(model: DbrxConfig) -> dict[str, int]:
    """Elements of both factors at rank 1 of a block's matrices that may have them: rows and columns."""
    d = model.d_model
    qkv = d + 2 * model.n_kv_heads * model.head_dim
    experts = model.num_experts * (model.ffn_hidden_size + d)
    return {"Wqkv": qkv + d, "out_proj": 2 * d, "w1": experts, "v1": experts, "w2": experts}
