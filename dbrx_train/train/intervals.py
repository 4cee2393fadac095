"""When a callback is due."""

from __future__ import annotations

from collections.abc import Callable

from composer import Event, State
from composer.utils.misc import create_interval_scheduler


def every(interval: str) -> Callable[[State], bool]:
    """Whether the step that has just ended reached a multiple of ``interval``, a Composer time string.

    For use at BATCH_END.
    """
    due = create_interval_scheduler(interval, include_end_of_training=False, checkpoint_events=False)
    return lambda state: bool(due(state, Event.BATCH_END))
