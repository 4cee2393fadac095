"""Stops the run on all ranks after the same step."""

from __future__ import annotations

from pathlib import Path

import torch
from composer import Callback, Logger, State
from composer.utils import dist
from torch.distributed import ReduceOp, Work, all_reduce

from dbrx_train.resilience import StoppedTogether
from dbrx_train.resilience.preemption import PreemptionHandler, cause, code_when_saved
from dbrx_train.train.callbacks.checkpoints import Checkpoints
from dbrx_train.train.tracking.events import record


class Preemption(Callback):  # type: ignore[misc]
    """Once any rank is asked to stop, all save and raise StoppedTogether. Comes after the other callbacks.

    The ranks agree by a reduction of one number, begun after the backward pass and read when the step is over
    and its losses have been waited for. It takes no group of its own: one more between all ranks' CPUs would
    be a socket from each to each. During an evaluation they agree at every batch, and give up the rest of it.
    """

    def __init__(self, stop: PreemptionHandler, saver: Checkpoints, folder: Path) -> None:
        self.stop, self.saver, self.folder = stop, saver, folder
        self.asked = torch.zeros((), dtype=torch.int64)
        self.work: Work | None = None

    def fit_start(self, state: State, logger: Logger) -> None:
        self._answer()  # of a step after which the run was rolled back
        if dist.get_world_size() > 1:
            self.asked = state.device.tensor_to_device(self.asked)

    def batch_start(self, state: State, logger: Logger) -> None:
        self.stop.begin_training()

    def after_train_batch(self, state: State, logger: Logger) -> None:
        self._ask()

    def batch_checkpoint(self, state: State, logger: Logger) -> None:
        number = self._answer()
        if not number and self.saver.saved is state.timestamp:  # which may have taken minutes
            self._ask()
            number = self._answer()
        if state.timestamp >= state.max_duration:  # let it come to its end
            self.saver.wait()
            self.stop.safe = True
        elif number:
            self._stop(state, number)

    def eval_batch_start(self, state: State, logger: Logger) -> None:
        if self.stop.training:
            self._ask()

    def eval_batch_end(self, state: State, logger: Logger) -> None:
        if self.stop.training and (number := self._answer()):
            self._stop(state, number)

    def meet(self) -> None:
        """Wait for the other ranks."""
        self._ask()
        self._answer()

    def _ask(self) -> None:
        self.asked.fill_(self.stop.asked())  # which waits for no device
        if dist.get_world_size() > 1:
            self.work = all_reduce(self.asked, ReduceOp.MAX, async_op=True)

    def _answer(self) -> int:
        """Why the run is to stop, the same on every rank; 0: it is not."""
        if self.work is not None:
            self.work.wait()
            self.work = None
        return int(self.asked)

    def _stop(self, state: State, number: int) -> None:
        self.stop.begin(number)
        self.saver.save_now(state)
        self.meet()  # rank 0 may still be copying the manifest to an object store
        self.stop.safe = True
        time = state.timestamp
        facts = {"step": time.batch.value, "tokens": time.token.value, "cause": cause(number)}
        record(self.folder, "stopped", **facts)
        raise StoppedTogether(code_when_saved(number))
