"""The callbacks of a run, all of them, in the order in which Composer calls them at every event."""

from __future__ import annotations

import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from composer import Callback, DataSpec
from composer.callbacks import MemoryMonitor, SpeedMonitor
from composer.utils import dist

from dbrx_train.checkpoint.huggingface import check_exportable
from dbrx_train.checkpoint.remote import Remote
from dbrx_train.checkpoint.remote_lease import RemoteLease
from dbrx_train.config import RunConfig, naming
from dbrx_train.data.tokenizer import Tokenizer
from dbrx_train.lease import Lease
from dbrx_train.resilience.preemption import PreemptionHandler
from dbrx_train.train.callbacks.activations import Activations
from dbrx_train.train.callbacks.ancestry import Ancestry
from dbrx_train.train.callbacks.bad_steps import BadSteps
from dbrx_train.train.callbacks.balancing import ExpertBalancing
from dbrx_train.train.callbacks.by_source import BySource
from dbrx_train.train.callbacks.checkpoints import Checkpoints
from dbrx_train.train.callbacks.compiled import Compiled
from dbrx_train.train.callbacks.expert_load import ExpertLoad
from dbrx_train.train.callbacks.garbage import GarbageCollection
from dbrx_train.train.callbacks.goodput import Goodput
from dbrx_train.train.callbacks.gradients import GradientNorm
from dbrx_train.train.callbacks.heartbeat import HeartbeatCallback
from dbrx_train.train.callbacks.learning_rate import LearningRate
from dbrx_train.train.callbacks.log_lines import LogLines
from dbrx_train.train.callbacks.memory import PeakMemory
from dbrx_train.train.callbacks.mix import MixServed
from dbrx_train.train.callbacks.norms import GroupNorms
from dbrx_train.train.callbacks.preemption import Preemption
from dbrx_train.train.callbacks.profiler import Profiler
from dbrx_train.train.callbacks.progress import Progress
from dbrx_train.train.callbacks.tasks import InContextTasks, task_benchmark
from dbrx_train.train.exports import Exports
from dbrx_train.train.sharded import ReduceOnce
from dbrx_train.train.tracking.provenance import provenance
from dbrx_train.train.train_state import TrainState

__all__ = ["METRICS", "Supervision", "callbacks"]

METRICS = (
    *(GroupNorms, BySource, Goodput, Activations, Profiler, ExpertLoad, MixServed, SpeedMonitor),
    InContextTasks,
)
"""Those that only look: a run without them has the same weights."""


@dataclass(frozen=True)
class Supervision:
    """What watches over this process while it trains."""

    heartbeat: HeartbeatCallback
    stop: PreemptionHandler
    leases: Sequence[Lease | RemoteLease]
    """Of the run's folder, and of its place on an object store, on the rank that holds them."""


def callbacks(
    config: RunConfig,
    tokenizer: Tokenizer,
    data: DataSpec,
    device: str,
    peak_flops: float,
    remote: Remote | None,
    supervision: Supervision | None,
) -> list[Callback]:
    """What a Trainer of ``config`` is given. ``data``: of training; ``peak_flops``: of one device, for MFU.

    Raises:
        ConfigError: the model cannot be exported as asked for.
    """
    clock, folder, optimization = config.clock, Path(config.folder), config.optimization
    often = clock.interval(config.logging.interval)
    checkpoints = _checkpoints(config, tokenizer, remote, supervision.leases if supervision else ())
    bad_steps = BadSteps(config.bad_steps, folder) if config.bad_steps.skip else None
    goodput = Goodput(folder, often, _saves(config))
    watching = [goodput] if supervision is None else [supervision.heartbeat, goodput]
    found: list[Callback | None] = [
        # First, so that it knows where the run is when any other one hangs.
        supervision.heartbeat if supervision else None,
        # Ahead of all that draw numbers at a step's beginning or ask for the outcome at its end.
        TrainState(),
        GarbageCollection(),
        Compiled() if config.compile else None,
        LearningRate(optimization.learning_rate, clock),
        # Ahead of the forward passes' own: says which backward pass reduces between replicas.
        ReduceOnce(data.split_batch),
        ExpertBalancing(),
        # Gradients before they are clipped, or dropped.
        GroupNorms(often, clock),
        BySource(often),
        # Ahead of Checkpoints: keeps what was useful up to a save, and times the save from here.
        goodput,
        Activations(often, clock) if config.logging.activations else None,
        _profiler(config),
        # Ahead of Checkpoints: a roll-back leaves before the step is saved.
        bad_steps,
        # Clips, then has the step judged by the norm before: the one writer of the step's outcome.
        GradientNorm(optimization.clip_grad_norm, bad_steps),
        ExpertLoad(often),
        MixServed(often),
        SpeedMonitor(
            window_size=max(1, clock.first_step(config.logging.interval).batch),
            gpu_flops_available=peak_flops,
        ),
        # After all that may drop this step or take it back.
        _tasks(config, tokenizer, watching),
        PeakMemory(often) if device == "cpu" else MemoryMonitor(),
        Progress(clock, enabled=config.logging.progress),
        LogLines(often, clock, peak_flops) if _is_logged(config) else None,
        Ancestry(),
        # After all whose state it saves.
        checkpoints,
        # Last: asks whether this step has just been saved.
        _stopping(config, checkpoints, supervision),
    ]
    return [callback for callback in found if callback is not None]


def _is_logged(config: RunConfig) -> bool:
    """Whether lines take the place of the progress bar: on rank 0, where there is no terminal for it."""
    return config.logging.progress and dist.get_global_rank() == 0 and not sys.stderr.isatty()


def _saves(config: RunConfig) -> list[str]:
    intervals = (config.checkpoints.interval, config.checkpoints.export.interval)
    return [config.clock.interval(each) for each in intervals if each is not None]


def _tasks(config: RunConfig, tokenizer: Tokenizer, watching: Sequence[Callback]) -> InContextTasks | None:
    benchmark, clock = task_benchmark(config, tokenizer), config.clock
    if benchmark is None:
        return None
    return InContextTasks(
        benchmark,
        clock.interval(config.evaluation.interval),
        clock,
        at_start=config.evaluation.at_start,
        autocast=config.precision == "amp_bf16",
        watching=watching,
    )


def _profiler(config: RunConfig) -> Profiler | None:
    asked = config.profile
    if asked.at is None:
        return None
    where = Path(config.folder) / "profile"
    return Profiler(where, asked.at, asked.steps, memory=asked.memory, clock=config.clock)


def _checkpoints(
    config: RunConfig, tokenizer: Tokenizer, remote: Remote | None, leases: Sequence[Lease | RemoteLease]
) -> Checkpoints:
    options = config.checkpoints
    return Checkpoints(
        Path(config.folder) / "checkpoints",
        config.clock.interval(options.interval),
        options.keep,
        provenance(config, tokenizer),
        milestone=_milestones(config),
        asynchronous=options.asynchronous,
        remote=remote,
        prune_remote=options.prune_remote,
        timeout=config.parallelism.timeout,
        exports=_exports(config),
        leases=leases,
    )


def _milestones(config: RunConfig) -> Callable[[int], int]:
    """How many multiples of ``checkpoints.keep_every`` a step lies beyond."""
    every, clock = config.checkpoints.keep_every, config.clock
    if every is None:
        return lambda step: 0
    tokens = clock.tokens(every)
    return lambda step: int(clock.convert(step, "ba", "tok")) // tokens


def _exports(config: RunConfig) -> Exports | None:
    options = config.checkpoints.export
    if options.interval is None:
        return None
    with naming("checkpoints.export: "):
        check_exportable(config.model)
    interval = config.clock.interval(options.interval)
    return Exports(Path(config.folder) / "exports", interval, getattr(torch, options.dtype))


def _stopping(
    config: RunConfig, checkpoints: Checkpoints, supervision: Supervision | None
) -> Preemption | None:
    if supervision is None:
        return None
    return Preemption(supervision.stop, checkpoints, Path(config.folder))
