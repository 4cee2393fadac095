"""What a run is about to do, in a few lines, as ``dbrx-train plan`` has it."""

from __future__ import annotations

from dataclasses import replace

import torch

from dbrx_train.config import RunConfig
from dbrx_train.plan import hardware
from dbrx_train.plan.planner import held, plan
from dbrx_train.plan.table import counted
from dbrx_train.plan.world import mesh_shape, microbatch

__all__ = ["summary"]


def summary(config: RunConfig, device: str, world_size: int) -> str:
    """Parameters, length, the arithmetic of a batch, mesh and memory of a rank, and where it writes.

    The batch and the memory are those of the last and of the largest stage. On a GPU that plans know, the
    planned time is there, too.
    """
    model, clock = config.model, config.clock
    size = f"{counted(model.num_params)} parameters, {counted(model.num_active_params)} active"
    lines = [
        f"{config.run_name}: {size}; {clock.total_tokens:,} tokens in {clock.total_batches:,} steps",
        _batch(config, world_size),
        _mesh(config, device, world_size),
        *_time(config, device, world_size),
        f"writes to {config.folder}; MLflow: {config.logging.mlflow_uri}, {config.logging.experiment}",
    ]
    return "\n  ".join(lines)


def _batch(config: RunConfig, world_size: int) -> str:
    stages = config.clock.stages
    last, batch = stages[-1], microbatch(config, stages[-1], world_size)
    text = (
        f"a step is {last.global_batch_size:,} samples of {last.seq_len:,} tokens = "
        f"{batch.samples:,} in a microbatch x {batch.per_step:,} accumulated x {world_size:,} "
        f"{_ranks(world_size)}"
    )
    return text if len(stages) == 1 else f"{text}, from step {last.batch:,} on (stage {len(stages)})"


def _mesh(config: RunConfig, device: str, world_size: int) -> str:
    shape, holds = mesh_shape(config, world_size), held(config, world_size)
    parts = f"weights, gradients and optimizer {_bytes(holds.memory.shards)}"
    parts += f", activations {_bytes(holds.memory.activations)}"
    if world_size > 1:
        parts += f", gathered {_bytes(holds.memory.gathered)}"
    where = f"; {_bytes(holds.on_host)} on the host" if holds.on_host else ""
    mesh = f"replicate {shape.replicate} x shard {shape.shard}, experts over {shape.expert}"
    bound = "at most" if config.lora.rank else "about"
    total = _bytes(holds.memory.total)
    return f"{world_size} x {device}, {config.precision}: {mesh}; {bound} {total} a rank ({parts}{where})"


def _time(config: RunConfig, device: str, world_size: int) -> list[str]:
    """What the plan says of this GPU, if it is one of those."""
    if device != "gpu":
        return []
    found = hardware.recognised(torch.cuda.get_device_name())
    if found is None:
        return []
    planned = plan(replace(config, plan=replace(config.plan, gpu=found.name)), world_size)
    seconds, error = planned.step.total, planned.error
    about = f"{seconds:.3g} s a step (about {seconds * (1 - error):.3g} to {seconds * (1 + error):.3g})"
    mfu = f"MFU {100 * planned.mfu(causal=False):.0f} %"
    return [f"planned for {found.name}: {about}, {mfu}, {planned.cost.days:.3g} days; limit: {planned.limit}"]


def _ranks(world_size: int) -> str:
    return "rank" if world_size == 1 else "ranks"


def _bytes(number: int) -> str:
    return f"{number / 1e9:.3g} GB" if number >= 1e9 else f"{number / 1e6:.3g} MB"
