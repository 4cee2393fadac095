"""The part of a run's model that one rank has."""

from __future__ import annotations

from datetime import timedelta

import torch

from dbrx_train.config import RunConfig
from dbrx_train.model.compiling import compile_dense
from dbrx_train.model.decoder import Dbrx
from dbrx_train.model.lora import apply_lora, cast_frozen
from dbrx_train.parallel import GlobalBatchLoad, MeshShape, checkpoint_activations, parallelize

__all__ = ["build_model", "is_sharded", "param_dtype"]


def param_dtype(config: RunConfig) -> torch.dtype | None:
    """What the large matrices are gathered and multiplied in; None for float32, as they are kept."""
    return torch.bfloat16 if config.precision == "amp_bf16" else None


def is_sharded(config: RunConfig, ranks: int) -> bool:
    """Whether FSDP divides the model: over several ranks, or offloaded."""
    return ranks > 1 or config.parallelism.cpu_offload


def build_model(config: RunConfig, device: str, shape: MeshShape, *, draw: bool = True) -> Dbrx:
    """The run's model and adapters; over the several ranks of ``shape``, or offloaded, sharded.

    Weights are drawn from the run's seed, unless ``draw`` is False.
    """
    parallelism = config.parallelism
    sharded = is_sharded(config, shape.replicate * shape.shard)
    with torch.device("meta" if sharded or not draw else "cpu"):
        model = Dbrx(config.model, seed=config.seed)
    if config.lora.rank is not None:
        apply_lora(model, config.lora.rank, config.lora.alpha, config.lora.targets, config.seed)
        if config.precision == "amp_bf16":
            cast_frozen(model, torch.bfloat16)
    if config.compile:
        compile_dense(model)
    checkpoint_activations(model, parallelism.activation_checkpointing)
    if config.optimization.balance_over == "global_batch":
        model.batch_load = GlobalBatchLoad()
    if sharded:
        parallelize(
            model,
            shape,
            device_type="cpu" if device == "cpu" else "cuda",
            seed=config.seed if draw else None,
            param_dtype=param_dtype(config),
            reduce_dtype=getattr(torch, parallelism.reduce_dtype),
            reshard_after_forward=parallelism.reshard_after_forward,
            cpu_offload=parallelism.cpu_offload,
            timeout=timedelta(seconds=parallelism.timeout),
        )
    return model
