"""A run on so many ranks: its mesh, its microbatches, and whether they divide. No torch is needed."""

from __future__ import annotations

import warnings
from dataclasses import dataclass

from dbrx_train.config import ConfigError, RunConfig
from dbrx_train.parallel.mesh import MeshShape
from dbrx_train.schedule import Stage, samples_of

__all__ = ["Microbatch", "check_world", "largest_microbatch", "mesh_shape", "microbatch"]


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
            innermost=parallelism.innermost,
        )
        shape.check(config.model)
    except ValueError as error:
        raise ConfigError(f"parallelism.{error}") from None
    return shape


def microbatch(config: RunConfig, stage: Stage, ranks: int) -> Microbatch:
    """The microbatch of a ``stage`` that `check_world` has passed."""
    base, micro = config.data.seq_len, config.optimization.microbatch_size
    mine = stage.global_batch_size // ranks
    part = mine if micro is None else min(mine, samples_of(micro, base, stage.seq_len))
    return Microbatch(part, stage.seq_len, mine // part)


def largest_microbatch(config: RunConfig, ranks: int) -> Microbatch:
    """The microbatch with most tokens of all stages that `check_world` has passed."""
    found = [microbatch(config, stage, ranks) for stage in config.clock.stages]
    return max(found, key=lambda micro: (micro.tokens, micro.per_step))


def check_world(config: RunConfig, world_size: int) -> None:
    """The ranks form the mesh; every global batch splits over them, and a rank's share into microbatches.

    Raises:
        ConfigError: it does not.
    """
    mesh_shape(config, world_size)
    base, micro = config.data.seq_len, config.optimization.microbatch_size
    for stage in config.clock.stages:
        if stage.global_batch_size % world_size:
            # In samples of data.seq_len, as the configuration counts them
            unit = max(1, world_size * stage.seq_len // base)
            nearest = max(1, round(stage.tokens_per_batch / base / unit)) * unit
            raise ConfigError(
                f"optimization.global_batch_size: {stage} does not split over {world_size} ranks; the "
                f"nearest size that does, in samples of {base}, is {nearest}"
            )
        mine = stage.global_batch_size // world_size
        part = mine if micro is None else samples_of(micro, base, stage.seq_len)
        if mine % min(mine, part):
            raise ConfigError(
                f"optimization.microbatch_size: {micro} does not divide a rank's "
                f"{mine * stage.seq_len // base} samples of {base} tokens ({stage} over {world_size} ranks)"
            )
        if micro is not None and stage.seq_len > micro * base:
            warnings.warn(
                f"optimization.microbatch_size: a microbatch of {micro} x {base} tokens becomes a sample of "
                f"{stage.seq_len} after {stage.token:,} tokens",
                stacklevel=1,
            )
