"""Memory of a run on a CPU; on a GPU, Composer's MemoryMonitor does this."""

from __future__ import annotations

import resource
import sys

from composer import Callback, Logger, State

from dbrx_train.train.intervals import every

# ru_maxrss counts KiB on Linux and bytes on macOS.
_UNIT = 1 if sys.platform == "darwin" else 1024


class PeakMemory(Callback):  # type: ignore[misc]
    """Logs rank 0's largest resident memory so far, in GB, every ``interval``."""

    def __init__(self, interval: str) -> None:
        self.due = every(interval)

    def batch_end(self, state: State, logger: Logger) -> None:
        if self.due(state):
            peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * _UNIT
            logger.log_metrics({"memory/peak_resident_gb": peak / 1e9})
