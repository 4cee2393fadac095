"""One rank of a run: the mesh that it is part of, the microbatch that it runs, its part of the model."""

from __future__ import annotations

from dataclasses import dataclass

import torch

from dbrx_train.config import ConfigError, RunConfig
from dbrx_train.model.compiling import compile_dense
from dbrx_train.model.decoder import Dbrx
from dbrx_train.model.lora import apply_lora, cast_frozen
from dbrx_train.parallel import GlobalBatchLoad, MeshShape, checkpoint_activations, parallelize
from dbrx_train.schedule import samples_of

__all__ = ["Microbatch", "build_model", "is_sharded", "largest_microbatch", "mesh_shape", "param_dtype"]


@dataclass(frozen=True)
class Microbatch:
    """What a rank runs forward and backward at a time, and how often in an optimizer step."""

    samples: int
    seq_len: int
    per_step: int

    @property
    def tokens(self) -> int:
        return self.samples * self.seq_len


def mesh_shape(config: RunConfig, ranks: int) -> MeshShape:
    """The run's mesh on so many ranks.

    Raises:
        ConfigError: there is none.
    """
    parallelism = config.parallelism
    try:
        shape = MeshShape.of(
            ranks,
            replicate=None if parallelism.replicate == "auto" else int(parallelism.replicate),
            shard=None if parallelism.shard == "auto" else int(parallelism.shard),
            expert=parallelism.expert,
        )
        shape.check(config.model)
    except ValueError as error:
        raise ConfigError(f"parallelism.{error}") from None
    return shape


def largest_microbatch(config: RunConfig, ranks: int) -> Microbatch:
    """The microbatch with most tokens of all stages of the run."""
    base, micro = config.data.seq_len, config.optimization.microbatch_size
    found = []
    for stage in config.clock.stages:
        mine = max(1, stage.global_batch_size // ranks)
        part = mine if micro is None else min(mine, samples_of(micro, base, stage.seq_len))
        found.append(Microbatch(part, stage.seq_len, mine // part))
    return max(found, key=lambda m: (m.tokens, m.per_step))


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
    checkpoint_activations(model, parallelism.activation_checkpointing)
    if config.compile:
        compile_dense(model)
    if config.optimization.balance_over == "global_batch":
        model.batch_load = GlobalBatchLoad()
    if sharded:
        parallelize(
            model,
            shape,
            device_type="cpu" if device == "cpu" else "cuda",
            seed=config.seed if draw else None,
            param_dtype=param_dtype(config),
            reshard_after_forward=parallelism.reshard_after_forward,
            cpu_offload=parallelism.cpu_offload,
        )
    return model
