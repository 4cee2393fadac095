"""Signals in a loader's worker processes."""

from __future__ import annotations

import os
import signal
import threading

__all__ = ["ignore_signals_of_others"]


def ignore_signals_of_others(worker: int) -> None:
    """For DataLoader: let no signal end a worker but its parent's.

    Ctrl-C, and schedulers that end a job, signal all of its processes at once; but the rank that a worker
    belongs to has to finish its step and save.
    """
    for ignored in (signal.SIGINT, signal.SIGUSR1):
        signal.signal(ignored, signal.SIG_IGN)
    if hasattr(signal, "sigwaitinfo"):  # macOS lacks it, and tells nobody who sent a signal
        signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGTERM})
        threading.Thread(target=_end_with_parents, daemon=True).start()


def _end_with_parents() -> None:
    while signal.sigwaitinfo({signal.SIGTERM}).si_pid != os.getppid():
        pass
    os._exit(0)
