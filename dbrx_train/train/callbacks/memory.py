"""Memory of a run."""

from __future__ import annotations

import resource
import sys

import torch
from composer import Callback, Logger, State

from dbrx_train.train.intervals import every

# ru_maxrss counts KiB on Linux and bytes on macOS.
_UNIT = 1 if sys.platform == "darwin" else 1024


def peak_memory() -> int:
    """The most that this process has held so far, in bytes: of its GPU, if it has one; else of the host's."""
    if torch.cuda.is_available():
        return torch.cuda.max_memory_reserved()
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * _UNIT


class PeakMemory(Callback):  # type: ignore[misc]
    """Logs rank 0's largest resident memory on a CPU so far, in GB, every ``interval``.

    On a GPU, Composer's MemoryMonitor does this.
    """

    def __init__(self, interval: str) -> None:
        self.due = every(interval)

    def batch_end(self, state: State, logger: Logger) -> None:
        if self.due(state):
            logger.log_metrics({"memory/peak_resident_gb": peak_memory() / 1e9})
