"""When a callback is due."""

from __future__ import annotations

from collections.abc import Callable
from typing import cast

from composer import Event, State
from composer.utils.misc import create_interval_scheduler

from dbrx_train.schedule import Clock, Unit, parse_time


def every(interval: str) -> Callable[[State], bool]:
    """Whether the step that has just ended reached a multiple of ``interval``, a Composer time string.

    For use at BATCH_END.
    """
    due = create_interval_scheduler(interval, include_end_of_training=False, checkpoint_events=False)
    return lambda state: bool(due(state, Event.BATCH_END))


def upcoming(interval: str, clock: Clock) -> Callable[[State], bool]:
    """The same of the step that is under way, for use before BATCH_END."""
    number, unit = parse_time(interval, "interval")
    counted = cast(Unit, unit)
    names = {"tok": "token", "sp": "sample", "ba": "batch"}

    def due(state: State) -> bool:
        before = getattr(state.timestamp, names[counted]).value
        after = before + clock.stage(before, counted).per_batch(counted)
        return bool(before // number != after // number)

    return due
