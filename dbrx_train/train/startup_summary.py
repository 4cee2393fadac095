"""What a run is about to do, in a few lines."""

from __future__ import annotations

from dbrx_train.config import RunConfig
from dbrx_train.plan.estimates import memory
from dbrx_train.plan.rank import largest_microbatch, mesh_shape, param_dtype
from dbrx_train.schedule import samples_of

__all__ = ["summary"]


def summary(config: RunConfig, device: str, world_size: int) -> str:
    """Parameters, length, the arithmetic of a batch, mesh and memory of a rank, and where it writes.

    The batch and the memory are those of the last and of the largest stage.
    """
    model, clock = config.model, config.clock
    size = f"{_count(model.num_params)} parameters, {_count(model.num_active_params)} active"
    lines = [
        f"{config.run_name}: {size}; {clock.total_tokens:,} tokens in {clock.total_batches:,} steps",
        _batch(config, world_size),
        _mesh(config, device, world_size),
        f"writes to {config.folder}; MLflow: {config.logging.mlflow_uri}, {config.logging.experiment}",
    ]
    return "\n  ".join(lines)


def _batch(config: RunConfig, world_size: int) -> str:
    stages = config.clock.stages
    last = stages[-1]
    mine = last.global_batch_size // world_size
    micro = config.optimization.microbatch_size
    part = mine if micro is None else min(mine, samples_of(micro, config.data.seq_len, last.seq_len))
    text = (
        f"a step is {last.global_batch_size:,} samples of {last.seq_len:,} tokens = "
        f"{part:,} in a microbatch x {mine // part:,} accumulated x {world_size:,} {_ranks(world_size)}"
    )
    return text if len(stages) == 1 else f"{text}, from step {last.batch:,} on (stage {len(stages)})"


def _mesh(config: RunConfig, device: str, world_size: int) -> str:
    shape, micro = mesh_shape(config, world_size), largest_microbatch(config, world_size)
    held = memory(
        config.model,
        shape,
        tokens=micro.tokens,
        param_dtype=param_dtype(config),
        activation_checkpointing=config.parallelism.activation_checkpointing,
        reshard_after_forward=config.parallelism.reshard_after_forward,
        accumulates=micro.per_step > 1,
    )
    where = " on the host" if config.parallelism.cpu_offload else ""
    parts = f"weights, gradients and optimizer {_bytes(held.shards)}{where}"
    parts += f", activations {_bytes(held.activations)}"
    if world_size > 1:
        parts += f", gathered {_bytes(held.gathered)}"
    total = held.total if world_size > 1 else held.shards + held.activations
    mesh = f"replicate {shape.replicate} x shard {shape.shard}, experts over {shape.expert}"
    bound = "at most" if config.lora.rank else "about"
    return f"{world_size} x {device}, {config.precision}: {mesh}; {bound} {_bytes(total)} a rank ({parts})"


def _ranks(world_size: int) -> str:
    return "rank" if world_size == 1 else "ranks"


def _count(number: int) -> str:
    for unit, size in (("B", 1e9), ("M", 1e6)):
        if number >= size:
            return f"{number / size:.3g}{unit}"
    return f"{number:,}"


def _bytes(number: int) -> str:
    return f"{number / 1e9:.3g} GB" if number >= 1e9 else f"{number / 1e6:.3g} MB"
