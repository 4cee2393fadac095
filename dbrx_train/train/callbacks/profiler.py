"""A look into a few steps: what ran when, and what held memory."""

from __future__ import annotations

from pathlib import Path

import torch
from composer import Callback, Logger, State
from composer.utils import dist
from torch.profiler import ProfilerActivity, profile

from dbrx_train.schedule import Clock


class Profiler(Callback):  # type: ignore[misc]
    """Traces rank 0 for some steps, into ``ba{STEP}.trace.json.gz`` of ``folder``, named by the first.

    Args:
        folder: made if need be.
        at: a moment of the run; the first step that begins then is the first.
        steps: how many.
        memory: keep what was allocated on the GPU meanwhile, and where, in ``ba{STEP}.memory.pickle``.
        clock: the run's.
    """

    def __init__(self, folder: Path, at: str, steps: int, *, memory: bool, clock: Clock) -> None:
        self.folder, self.memory = folder, memory
        self.first = clock.first_step(at).batch
        self.last = self.first + steps
        self.profile: profile | None = None

    def batch_start(self, state: State, logger: Logger) -> None:
        if state.timestamp.batch.value != self.first or dist.get_global_rank() != 0:
            return
        if self.memory:
            torch.cuda.memory._record_memory_history()
        activities = [ProfilerActivity.CPU]
        if torch.cuda.is_available():
            activities.append(ProfilerActivity.CUDA)
        self.profile = profile(activities=activities)
        self.profile.start()  # type: ignore[no-untyped-call]

    def batch_end(self, state: State, logger: Logger) -> None:
        if self.profile is not None and state.timestamp.batch.value >= self.last:
            self._finish()

    def fit_end(self, state: State, logger: Logger) -> None:
        if self.profile is not None:
            self._finish()

    def _finish(self) -> None:
        assert self.profile is not None
        finished, self.profile = self.profile, None
        finished.stop()  # type: ignore[no-untyped-call]
        self.folder.mkdir(parents=True, exist_ok=True)
        stem = str(self.folder / f"ba{self.first}")
        finished.export_chrome_trace(f"{stem}.trace.json.gz")
        if self.memory:
            torch.cuda.memory._dump_snapshot(f"{stem}.memory.pickle")  # type: ignore[no-untyped-call]
            torch.cuda.memory._record_memory_history(enabled=None)
