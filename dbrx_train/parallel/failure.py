"""An error on one rank ends all of them, and is the one that is read.

Ranks wait for each other in collectives. Left alone, the others learn of a rank's error from a timeout, or
from an error of their own that says less.
"""

from __future__ import annotations

import os
import sys
import threading
import time
import traceback
import uuid
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import timedelta
from typing import Any

import torch.distributed as dist

from dbrx_train.redact import mask

__all__ = ["end_together"]

_POLL_SECONDS = 0.5
_FIRST_SECONDS = 1.0  # for the failed rank to say what went wrong before others say that they end
_OTHERS_SECONDS = 4.0  # for all others to end of their own accord
_CLOSE_SECONDS = 10.0


@dataclass
class Ending:
    """How a process ends for another rank's error."""

    at_end: Callable[[], None] = lambda: None
    """Called from a thread of its own, shortly before."""


@contextmanager
def end_together(show: Callable[[Exception], int] | None = None) -> Iterator[Ending]:
    """Within seconds of an Exception in the body on one rank, all ranks end.

    The first rank that fails prints its error, and ends with SystemExit a few seconds later. The others
    exit with 1, wherever they are, after a line that names that rank and its error; so does the failed one if
    it is still there after ten seconds. A rank that is stopped by a signal ends the others too. ``show``
    prints the error and returns the exit code; by default a traceback and 1. On one rank alone the error is
    raised. torch.distributed must be initialised, from the environment that a launcher sets.
    """
    ending = Ending()
    if dist.get_world_size() == 1:
        yield ending
        return
    notice, over = _Notice(), threading.Event()
    threading.Thread(target=_watch, args=(notice, over, ending), name="failures", daemon=True).start()
    try:
        yield ending
    except (KeyboardInterrupt, SystemExit):
        over.set()
        notice.post("was stopped")
        _exit_in(_CLOSE_SECONDS)
        raise
    except Exception as error:
        over.set()
        first = notice.post(mask(f"failed: {type(error).__name__}: {error}"))
        _exit_in(_CLOSE_SECONDS)
        if first is None:
            code = (show or _traceback)(error)
            time.sleep(_OTHERS_SECONDS)
            sys.exit(code)
        time.sleep(_FIRST_SECONDS)
        _say(first)
        sys.exit(1)
    finally:
        over.set()


def _traceback(error: Exception) -> int:
    trace = mask("".join(traceback.format_exception(error)))
    print(f"rank {dist.get_rank()} failed:", trace, sep="\n", file=sys.stderr)
    return 1


class _Notice:
    """What failed first, on the launcher's store."""

    def __init__(self) -> None:
        host, port = os.environ["MASTER_ADDR"], int(os.environ["MASTER_PORT"])
        store: Any = dist  # whose stubs do not know of its stores
        self._store = store.TCPStore(host, port, is_master=False, timeout=timedelta(seconds=30))
        names = [uuid.uuid4().hex]  # of its own, for a launcher's store outlives restarts
        dist.broadcast_object_list(names)
        self._key = f"dbrx_train/{names[0]}"

    def post(self, what: str) -> str | None:
        """Tell the other ranks; returns what another one told before, if any."""
        mine = f"rank {dist.get_rank()} {what}"
        try:
            first = self._store.compare_set(self._key, "", mine).decode()
        except RuntimeError:  # the store's rank is gone
            return None
        return None if first == mine else first

    def read(self) -> str | None:
        return self._store.get(self._key).decode() if self._store.check([self._key]) else None


def _watch(notice: _Notice, over: threading.Event, ending: Ending) -> None:
    while not over.wait(_POLL_SECONDS):
        try:
            first = notice.read()
        except RuntimeError:  # the rank that holds the store has ended, as it does when all is done
            return
        if first is not None and not over.wait(_FIRST_SECONDS):
            _exit_in(_CLOSE_SECONDS)
            _say(first)
            ending.at_end()
            over.wait(_FIRST_SECONDS)  # the launcher ends all when it sees that one did
            os._exit(1)


def _exit_in(seconds: float) -> None:
    """End the process then, whatever it is waiting for."""
    timer = threading.Timer(seconds, os._exit, [1])
    timer.daemon = True
    timer.start()


def _say(first: str) -> None:
    if os.environ.get("LOCAL_RANK", "0") == "0":
        print(f"rank {dist.get_rank()} ends, for {first}", file=sys.stderr, flush=True)
