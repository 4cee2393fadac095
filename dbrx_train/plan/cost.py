"""What a run takes beyond its steps: days, GPU-hours, money, energy, checkpoints, failures, data."""

from __future__ import annotations

import math
from dataclasses import dataclass

from dbrx_train.config import RunConfig
from dbrx_train.plan.adapters import trained
from dbrx_train.plan.estimates import state_bytes
from dbrx_train.plan.hardware import GPU
from dbrx_train.plan.units import FLOAT32
from dbrx_train.schedule import parse_time

__all__ = ["Cost", "best_interval", "cost", "lost_share"]

_DAY = 86_400.0
_TO_HOST = 25e9
"""Bytes/s from a GPU to its host's memory, over PCIe."""
_ID = 4
"""Bytes of a token in a shard, uncompressed (uint32)."""


@dataclass(frozen=True)
class Cost:
    """A run's length and price, and what its checkpoints and failures take of it."""

    days: float
    """Of wall time, goodput included."""
    gpu_hours: float
    dollars: float | None
    """None where no price is known."""
    megawatt_hours: float
    checkpoint: float
    """Bytes of one."""
    write: float
    """Seconds until it is on the store."""
    stall: float
    """Seconds that training waits for it."""
    between_failures: float
    """Seconds, on average."""
    interval: float
    """Seconds between checkpoints as configured."""
    best_interval: float
    goodput: float
    """Share of the time in which the run gets on, as configured."""
    best_goodput: float
    """The same with the best interval."""
    read: float
    """Bytes of data that a machine reads a second, uncompressed."""
    host_memory: float
    """Bytes of a machine's memory: checkpoints on their way, offloaded shards, batches made ahead."""


def best_interval(stall: float, between_failures: float) -> float:
    """Seconds from checkpoint to checkpoint that lose least (Daly 2006, doi 10.1016/j.future.2004.11.016).

        sqrt(2 s M) (1 + sqrt(s / 2M) / 3 + s / 18M) - s        for s < 2M, else M

    with s seconds of stall and M between failures; the root alone is Young's (1974).
    """
    if stall >= 2 * between_failures:
        return between_failures
    share = stall / (2 * between_failures)
    return math.sqrt(2 * stall * between_failures) * (1 + math.sqrt(share) / 3 + share / 9) - stall


def lost_share(interval: float, stall: float, late: float, restart: float, between_failures: float) -> float:
    """Share of the time that checkpoints and failures take.

    A checkpoint stalls the run once an ``interval``; a failure loses half an interval, the seconds ``late``
    until the last checkpoint counted, and the ``restart``.
    """
    return min(1.0, stall / interval + (interval / 2 + late + restart) / between_failures)


def cost(
    config: RunConfig, gpu: GPU, gpus: int, *, shard: int, seconds: float, tokens_per_second: float
) -> Cost:
    """Of a run whose steps take ``seconds`` in all; evaluation is left out."""
    given, params = config.plan, trained(config)
    checkpoint = params * (FLOAT32 + state_bytes(config.optimization.optimizer))
    write = checkpoint / (given.storage * 1e9)
    copy = checkpoint / shard / _TO_HOST
    asynchronous = config.checkpoints.asynchronous
    stall, late = (min(copy, write), write) if asynchronous else (write, 0.0)
    between = _DAY / (given.failures * gpus)
    best = max(best_interval(stall, between), late)
    interval = min(seconds, _interval_seconds(config, seconds))

    def goodput(every: float) -> float:
        return 1 - lost_share(every, stall, late, given.restart_seconds, between)

    wall = seconds / goodput(interval) if goodput(interval) > 0 else math.inf
    gpu_hours = wall / 3600 * gpus
    price = given.gpu_hour_price or gpu.hour_price
    on_machine = min(given.machine, gpus)
    per_rank = checkpoint / shard if asynchronous else 0.0
    if config.parallelism.cpu_offload:
        per_rank += 16 * config.model.num_params / shard
    largest = max(stage.tokens_per_batch for stage in config.clock.stages) / gpus
    # Ids, labels and documents of two batches ahead, int64, a worker.
    per_rank += max(1, config.data.num_workers) * 2 * 3 * 8 * largest
    return Cost(
        days=wall / _DAY,
        gpu_hours=gpu_hours,
        dollars=None if price is None else gpu_hours * price,
        megawatt_hours=gpu_hours * (given.watts or gpu.watts) * given.pue / 1e6,
        checkpoint=checkpoint,
        write=write,
        stall=stall,
        between_failures=between,
        interval=interval,
        best_interval=min(best, seconds),
        goodput=goodput(interval),
        best_goodput=goodput(min(best, seconds)),
        read=tokens_per_second * _ID * on_machine / gpus,
        host_memory=per_rank * on_machine,
    )


def _interval_seconds(config: RunConfig, seconds: float) -> float:
    """The configured interval as a share of the run's tokens, in time."""
    number, unit = parse_time(config.checkpoints.interval, "checkpoints.interval")
    clock = config.clock
    share = number if unit == "dur" else clock.convert(number, unit, "tok") / clock.total_tokens
    return float(share) * seconds
