"""Collects Python's garbage on all ranks at the same steps."""

from __future__ import annotations

import gc

from composer import Callback, Logger, State


class GarbageCollection(Callback):  # type: ignore[misc]
    """Turns automatic collection off while training runs, and collects every ``steps`` steps instead.

    Left to itself, each rank would stand still at a step of its own, and all others wait for it. What is
    there when training begins is set aside, so that a collection looks at the steps' garbage alone.
    """

    def __init__(self, steps: int = 100) -> None:
        self.steps, self.turned_off = steps, False

    def fit_start(self, state: State, logger: Logger) -> None:
        if gc.isenabled():  # not after a roll-back, say
            self.turned_off = True
            gc.collect()
            gc.freeze()
            gc.disable()

    def batch_end(self, state: State, logger: Logger) -> None:
        if state.timestamp.batch.value % self.steps == 0:
            gc.collect()

    def fit_end(self, state: State, logger: Logger) -> None:
        self._restore()

    def close(self, state: State, logger: Logger) -> None:
        self._restore()  # however the run ended

    def _restore(self) -> None:
        if self.turned_off:
            self.turned_off = False
            gc.unfreeze()
            gc.enable()
