"""How much of a run's time was useful, over all its starts."""

from __future__ import annotations

import time
import warnings
from pathlib import Path

from dbrx_train import jsonl
from dbrx_train.errors import first_line

__all__ = ["GoodputLedger"]


class GoodputLedger:
    """Time since a run was first started, and how much of it went into steps that count.

    Time between a run's starts counts by the wall clock, and within one by a clock that does not jump. What
    was useful beyond the step that a run goes on from is taken back.

    Args:
        folder: the run's; its ``time.jsonl`` is read and prolonged.
        step: the one that the run goes on from.
        ago: seconds since this process was started.
    """

    def __init__(self, folder: Path, step: int, ago: float = 0.0) -> None:
        self.path = folder / jsonl.TIMES
        self._past: list[tuple[int, float]] = [(0, 0.0)]
        """Steps that count, and the useful seconds up to each."""
        self._before = 0.0
        self._began = time.monotonic() - ago
        written = jsonl.Tail(self.path).read()
        for entry in written:
            self.rewind(entry["step"])
            self._past.append((entry["step"], entry["useful"]))
        if written:
            idle = time.time() - ago - written[-1]["time"]
            self._before = written[-1]["elapsed"] + max(0.0, idle)
        self.rewind(step)

    @property
    def elapsed(self) -> float:
        return self._before + time.monotonic() - self._began

    @property
    def useful(self) -> float:
        return self._past[-1][1]

    @property
    def goodput(self) -> float:
        return min(1.0, self.useful / max(self.elapsed, 1e-9))

    def rewind(self, step: int) -> None:
        """What came after ``step`` is lost."""
        while self._past[-1][0] > step:
            self._past.pop()

    def lose(self, since: int) -> None:
        """The work of steps after ``since`` is lost, though the run goes on from where it is."""
        before = next(useful for step, useful in reversed(self._past) if step <= since)
        self._past.append((self._past[-1][0], before))

    def add(self, step: int, useful: float) -> None:
        """The run has come to ``step`` with so many more useful seconds; keep that."""
        self._past.append((step, self.useful + useful))
        entry = {
            "time": round(time.time(), 3),
            "step": step,
            "elapsed": round(self.elapsed, 3),
            "useful": round(self.useful, 3),
        }
        try:
            jsonl.append(self.path, entry)
        except OSError as error:  # a full disk is no reason to stop training
            warnings.warn(f"{self.path}: goodput is not kept ({first_line(error)})", stacklevel=1)
