"""Where a run's time goes."""

from __future__ import annotations

import logging
import time
from pathlib import Path

import psutil
import torch
from composer import Callback, Event, Logger, State
from composer.utils import dist
from composer.utils.misc import create_interval_scheduler

from dbrx_train.train.intervals import every
from dbrx_train.train.tracking.goodput_ledger import Ledger
from dbrx_train.train.train_state import outcome_of

_log = logging.getLogger(__name__)


class Wall(Callback):  # type: ignore[misc]
    """Splits the wall clock, and logs every ``interval``, in seconds since the last time,

    - ``wall/data_wait``, ``wall/checkpoint``, ``wall/evaluation``: what training stood still for, on the
      rank that it took longest;
    - ``wall/compute``: the rest, but for what came before the first step;
    - ``wall/goodput``: of all the time since the run was first started, the share that went into steps
      whose work is in the weights.

    Args:
        folder: the run's, where rank 0 keeps what has to outlive a restart (see ``Ledger``).
        saves: the intervals of checkpoints, at which that has to be exact.

    To be called ahead of what saves checkpoints.
    """

    def __init__(self, folder: Path, interval: str, saves: list[str]) -> None:
        self.folder = folder
        self.due = every(interval)
        self.saving = [create_interval_scheduler(each) for each in saves]
        self.ledger: Ledger | None = None
        self.phase: str | None = None  # before the first step
        self.spent = {"checkpoint": 0.0, "evaluation": 0.0}
        self.entered = self.marked = self.stepped = time.monotonic()
        self.waited = 0.0
        self.step = self.steps = self.kept = 0

    def fit_start(self, state: State, logger: Logger) -> None:
        self.step = state.timestamp.batch.value
        self.kept = 0
        if self.ledger is not None:  # it goes on from a checkpoint in the same process
            self.ledger.rewind(self.step)
        elif dist.get_global_rank() == 0:
            ago = max(0.0, time.time() - psutil.Process().create_time())
            self.ledger = Ledger(self.folder, self.step, ago)

    def _enter(self, phase: str) -> None:
        now = time.monotonic()
        if self.phase in self.spent:
            self.spent[self.phase] += now - self.entered
        self.phase, self.entered = phase, now

    def after_dataloader(self, state: State, logger: Logger) -> None:
        if self.phase is None:
            self.marked = self.stepped = time.monotonic()
            self.waited = state.train_dataloader.waited
            self.phase = "training"

    def before_dataloader(self, state: State, logger: Logger) -> None:
        if self.phase is not None:
            self._enter("training")

    def eval_before_all(self, state: State, logger: Logger) -> None:
        if self.phase is not None:
            self._enter("evaluation")

    def eval_after_all(self, state: State, logger: Logger) -> None:
        if self.phase is not None:
            self._enter("training")

    def batch_end(self, state: State, logger: Logger) -> None:
        step, now = state.timestamp.batch.value, time.monotonic()
        _log.debug("step %d: %.3f s since the one before", step, now - self.stepped)
        self.stepped = now
        if step <= self.step:  # rolled back
            self.kept = 0
            if self.ledger is not None:
                self.ledger.rewind(step - 1)
        self.step, self.steps = step, self.steps + 1
        self.kept += outcome_of(state).taken
        if self.due(state):
            self._mark(state, logger)

    def lose(self, since: int) -> None:
        """The weights are those of step ``since`` again, though the run goes on in time."""
        self.kept = 0
        if self.ledger is not None:
            self.ledger.lose(since)

    def batch_checkpoint(self, state: State, logger: Logger) -> None:
        saves = [saving(state, Event.BATCH_CHECKPOINT) for saving in self.saving]  # all, for each keeps count
        if any(saves) and self.steps:
            self._mark(state, logger)
        self._enter("checkpoint")

    def fit_end(self, state: State, logger: Logger) -> None:
        self._mark(state, logger)

    def close(self, state: State, logger: Logger) -> None:
        """Keep what was useful since the last time, for a run that ends early; without the other ranks."""
        if self.steps and self.ledger is not None:
            self._enter("training")
            waits = state.train_dataloader.waited - self.waited + sum(self.spent.values())
            self._keep(self.ledger, time.monotonic() - self.marked - waits)

    def _mark(self, state: State, logger: Logger) -> None:
        """Share what ranks waited for, and keep what was useful."""
        assert self.phase is not None
        self._enter("training")
        waited, self.waited = state.train_dataloader.waited - self.waited, state.train_dataloader.waited
        waits = state.device.tensor_to_device(torch.tensor([waited, *self.spent.values()]))
        dist.all_reduce(waits, "MAX")
        now = time.monotonic()
        wall, self.marked = now - self.marked, now
        found = dict(zip(("data_wait", *self.spent), waits.tolist(), strict=True))
        found["compute"] = compute = max(0.0, wall - sum(found.values()))
        if self.ledger is not None:
            self._keep(self.ledger, compute)
        if self.steps:  # else it is the end, which is a whole interval of nothing
            logger.log_metrics({f"wall/{name}": value for name, value in found.items()})
        self.spent = dict.fromkeys(self.spent, 0.0)
        self.steps = self.kept = 0
        if self.ledger is not None:
            logger.log_metrics({"wall/goodput": self.ledger.goodput})

    def _keep(self, ledger: Ledger, compute: float) -> None:
        """Of so many seconds, those of steps whose work was neither skipped nor lost."""
        ledger.add(self.step, compute * self.kept / max(1, self.steps))
