"""What keeps a run alive, or ends it well: failures, hangs, signals, loss spikes. Without Composer."""

from dbrx_train.resilience.failure import StoppedTogether, propagate_failures
from dbrx_train.resilience.watchdog import Heartbeat

__all__ = ["Heartbeat", "StoppedTogether", "propagate_failures"]
