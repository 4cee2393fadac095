"""What keeps a run alive, or ends it well: failures, hangs, signals, loss spikes. Without Composer."""

from dbrx_train.resilience.failure import StoppedTogether, end_together
from dbrx_train.resilience.watchdog import Progress

__all__ = ["Progress", "StoppedTogether", "end_together"]
