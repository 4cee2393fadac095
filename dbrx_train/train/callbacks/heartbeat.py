"""Notes where the run is, for hangs to be found out."""

from __future__ import annotations

from composer import Callback, Event, Logger, State

from dbrx_train.resilience import Progress

_PHASES = {
    Event.FIT_START: "starting",
    Event.BEFORE_DATALOADER: "waiting for data",
    Event.AFTER_DATALOADER: "in the forward and backward passes",
    Event.AFTER_TRAIN_BATCH: "in the optimizer's step",
    Event.EVAL_STANDALONE_START: "evaluating",
    Event.EVAL_BEFORE_ALL: "evaluating",
    Event.BATCH_CHECKPOINT: "saving",
    Event.FIT_END: "ending",
}
_UNLIMITED = ("saving", "ending")  # their own waits give up in time


class Phases(Callback):  # type: ignore[misc]
    """Moves ``progress`` on at every event. Comes before the other callbacks.

    Args:
        first_step: seconds without an event at which a run hangs until its first step is done, and while it
            evaluates.
        step: the same for all other steps. None: never.
    """

    def __init__(self, progress: Progress, first_step: float | None, step: float | None) -> None:
        self.progress, self.first_step, self.step = progress, first_step, step
        self.phase, self.stepped = "starting", False

    def run_event(self, event: Event, state: State, logger: Logger) -> None:
        self.phase = _PHASES.get(event, self.phase)
        self.stepped = self.stepped or event == Event.BATCH_END
        self._move(state.timestamp.batch.value)

    def batch_arrived(self) -> None:
        """This rank's loader has a batch: what it waits for from here on is other ranks' data."""
        self.phase = "waiting for other ranks' data"
        self._move(self.progress.place.step)

    def _move(self, step: int) -> None:
        limit = self.step if self.stepped and self.phase != "evaluating" else self.first_step
        self.progress.move(step, self.phase, None if self.phase in _UNLIMITED else limit)
