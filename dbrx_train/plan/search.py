"""The best mesh, microbatch and activation checkpointing for a run on given GPUs: all are tried."""

from __future__ import annotations

import warnings
from collections.abc import Iterator
from dataclasses import replace
from itertools import product

from dbrx_train.config import ConfigError, RunConfig
from dbrx_train.model.config import ACTIVATION_CHECKPOINTING
from dbrx_train.plan.hardware import GPUS
from dbrx_train.plan.planner import Plan, held, kind, plan
from dbrx_train.plan.step_time import RUNTIME
from dbrx_train.plan.world import check_world, largest_microbatch

__all__ = ["changes", "nearest", "search"]

_MOST_GPUS = 16_384


def search(config: RunConfig, gpus: int) -> list[Plan]:
    """All plans on ``gpus`` GPUs that fit, the quickest first."""
    return sorted(_fitting(config, gpus), key=lambda each: each.step.total)


def changes(config: RunConfig, found: Plan) -> list[str]:
    """What makes the plan's configuration of ``config``, as ``key=value``."""
    before, after = (_resolved(each, found.gpus) for each in (config, found.config))
    if config.parallelism.replicate == "auto":
        del after["parallelism.replicate"]
    if largest_microbatch(config, found.gpus) == largest_microbatch(found.config, found.gpus):
        del after["optimization.microbatch_size"]
    return [f"{key}={str(new).lower()}" for key, new in after.items() if before[key] != new]


def nearest(config: RunConfig, gpus: int) -> str:
    """What would make a configuration fit that does not, and is nearest to it: the end of a line."""
    if found := search(config, gpus):
        best = min(found, key=lambda each: (len(changes(config, each)), each.step.total))
        return f"it would fit with {' '.join(changes(config, best))} ({best.held.total / 1e9:.1f} GB a rank)"
    more = gpus
    while (more := more * 2) <= _MOST_GPUS:
        if found := search(config, more):
            best = found[0]
            return f"it would fit on {more} GPUs with {' '.join(changes(config, best))}"
    larger = {each.memory: each.name for each in GPUS.values()}
    for _, name in sorted(larger.items()):
        if found := search(replace(config, plan=replace(config.plan, gpu=name)), gpus):
            return f"it would fit with plan.gpu={name} {' '.join(changes(config, found[0]))}"
    return "nothing that was tried would fit; take shorter samples or a smaller model"


def _fitting(config: RunConfig, gpus: int) -> Iterator[Plan]:
    room = kind(config).memory - RUNTIME
    for tried in _all(config, gpus):
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            try:
                check_world(tried, gpus)
            except ConfigError:
                continue
            if held(tried, gpus).total <= room:
                yield plan(tried, gpus)


def _all(config: RunConfig, gpus: int) -> Iterator[RunConfig]:
    """The configuration with everything that divides."""
    share = max(stage.tokens_per_batch for stage in config.clock.stages) // gpus // config.data.seq_len
    batches = [replace(config.optimization, microbatch_size=n) for n in _divisors(max(1, share))]
    meshes = product(
        _divisors(gpus),
        _divisors(config.model.num_experts),
        ("expert", "shard"),
        ACTIVATION_CHECKPOINTING,
        (True, False),
    )
    for shard, expert, innermost, recomputed, reshard in meshes:
        if shard % expert or (innermost != config.parallelism.innermost and expert in (1, shard)):
            continue  # the same
        if recomputed == "full_keep_dispatched" and expert == 1:
            continue  # nothing is dispatched
        spread = replace(
            config.parallelism,
            replicate=gpus // shard,
            shard=shard,
            expert=expert,
            innermost=innermost,
            activation_checkpointing=recomputed,
            reshard_after_forward=reshard,
        )
        for batch in batches:
            yield replace(config, parallelism=spread, optimization=batch)


def _resolved(config: RunConfig, gpus: int) -> dict[str, int | str | bool]:
    """By its key, what `_all` varies, with ``auto`` as numbers."""
    given = config.parallelism
    shard = given.shard if isinstance(given.shard, int) else None
    replicate = given.replicate if isinstance(given.replicate, int) else gpus // (shard or gpus)
    return {
        "parallelism.replicate": replicate,
        "parallelism.shard": shard or gpus // replicate,
        "parallelism.expert": given.expert,
        "parallelism.innermost": given.innermost,
        "parallelism.activation_checkpointing": given.activation_checkpointing,
        "parallelism.reshard_after_forward": given.reshard_after_forward,
        "optimization.microbatch_size": config.optimization.microbatch_size or 0,
    }


def _divisors(number: int) -> list[int]:
    return [n for n in range(1, number + 1) if number % n == 0]
