"""Memory of a run on a CPU; on a GPU, Composer's MemoryMonitor does this."""

from __future__ import annotations

import resource
import sys

from composer import Callback, Logger, State

# ru_maxrss counts KiB on Linux and bytes on macOS.
_UNIT = 1 if sys.platform == "darwin" else 1024


class PeakMemory(Callback):  # type: ignore[misc]
    """Logs rank 0's largest resident memory so far, in GB, every ``interval`` batches."""

    def __init__(self, interval: int) -> None:
        self.interval = interval

    def batch_end(self, state: State, logger: Logger) -> None:
        if state.timestamp.batch.value % self.interval == 0:
            peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * _UNIT
            logger.log_metrics({"memory/peak_resident_gb": peak / 1e9})
