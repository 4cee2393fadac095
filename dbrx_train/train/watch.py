"""What watches a run and changes nothing in it; docs/monitoring.md says what each logs."""

from __future__ import annotations

from pathlib import Path

from composer import Callback

from dbrx_train.config import RunConfig
from dbrx_train.train.callbacks.activations import Activations
from dbrx_train.train.callbacks.by_source import BySource
from dbrx_train.train.callbacks.norms import GroupNorms
from dbrx_train.train.callbacks.profiler import Profiler
from dbrx_train.train.callbacks.wall import Wall

__all__ = ["watchers"]


def watchers(config: RunConfig) -> list[Callback]:
    """To be called ahead of what clips gradients and what saves checkpoints."""
    clock, folder, profile = config.clock, Path(config.folder), config.profile
    often = clock.interval(config.logging.interval)
    saves = [config.checkpoints.interval, config.checkpoints.export.interval]
    found: list[Callback] = [
        GroupNorms(often, clock),
        BySource(often),
        Wall(folder, often, [clock.interval(each) for each in saves if each is not None]),
    ]
    if config.logging.activations:
        found.append(Activations(often, clock))
    if profile.at is not None:
        found.append(
            Profiler(folder / "profile", profile.at, profile.steps, memory=profile.memory, clock=clock)
        )
    return found
