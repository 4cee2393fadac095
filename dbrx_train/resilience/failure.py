"""An error on one rank, a stop or a hang ends all of them, and is the one that is read.

Ranks wait for each other in collectives. Left alone, the others learn of a rank's error from a timeout, or
from an error of their own that says less.
"""

from __future__ import annotations

import faulthandler
import json
import os
import signal
import sys
import threading
import time
import traceback
import uuid
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import timedelta
from pathlib import Path
from typing import Any, NamedTuple

import torch.distributed as dist

from dbrx_train.errors import HUNG, MISTAKE, exit_code
from dbrx_train.redact import mask
from dbrx_train.resilience.watchdog import Heartbeat, Watchdog

__all__ = ["StoppedTogether", "propagate_failures"]

_POLL_SECONDS = 0.5
_POLLS_A_SECOND = 1000  # of all ranks together, which one process answers
_FIRST_SECONDS = 1.0  # for the failed rank to say what went wrong before others say that they end
_OTHERS_SECONDS = 4.0  # for all others to end of their own accord
_CLOSE_SECONDS = 10.0


class StoppedTogether(SystemExit):
    """Raised by all ranks at the same step, so that none need tell the others."""


class _End(NamedTuple):
    """Why all ranks end."""

    rank: int
    what: str
    code: int
    behind: int | None
    """The rank that others wait for, if they do."""

    def __str__(self) -> str:
        return f"rank {self.rank} {self.what}"


class _Notice:
    """What came first, on the launcher's store; on one rank alone, on a store of its own."""

    def __init__(self) -> None:
        stores: Any = dist  # whose stubs do not know of its stores
        names = [uuid.uuid4().hex]  # of its own, for a launcher's store outlives restarts
        if dist.get_world_size() == 1:
            self.store = stores.HashStore()
        else:
            host, port = os.environ["MASTER_ADDR"], int(os.environ["MASTER_PORT"])
            self.store = stores.TCPStore(host, port, is_master=False, timeout=timedelta(seconds=30))
            dist.broadcast_object_list(names)
        self.key = f"dbrx_train/{names[0]}"

    def post(self, what: str, code: int, behind: int | None = None) -> _End | None:
        """Tell the other ranks; returns what another one told before, if any."""
        mine = _End(dist.get_rank(), what, code, behind)
        try:
            first = _End(*json.loads(self.store.compare_set(self.key, "", json.dumps(mine))))
        except RuntimeError:  # the store's rank is gone
            return None
        return None if first == mine else first

    def read(self) -> _End | None:
        return _End(*json.loads(self.store.get(self.key))) if self.store.check([self.key]) else None


@dataclass
class Ending:
    """How a process ends together with the others."""

    notice: _Notice
    at_end: Callable[[int], None] = lambda code: None
    """Called from a thread of its own, with the exit code, shortly before."""

    def tell(self, what: str, code: int) -> None:
        """End all ranks with ``code``, wherever they are, this one too."""
        self.notice.post(what, code)


@contextmanager
def propagate_failures(
    show: Callable[[Exception], int] | None = None,
    heartbeat: Heartbeat | None = None,
    stacks: Path | None = None,
) -> Iterator[Ending]:
    """Within seconds of an Exception in the body on one rank, all ranks end.

    The first rank that fails prints its error, and ends with SystemExit a few seconds later. The others
    exit with the same code, wherever they are, after a line that names that rank and its error, or without
    one if that is a user's mistake, which has been said; so does the failed one if it is still there after
    ten seconds. Signals of a launcher, which ends all when it sees that one has, change nothing by then.
    A rank that is stopped by a signal before ends the others too, with its own code. ``show`` prints the
    error and returns ``exit_code`` of it; by default a traceback and 1. On one rank alone
    the error is raised. torch.distributed must be initialised, from the environment that a launcher sets.

    With ``heartbeat``, a hang ends them too, with code ``HUNG``: each writes the stacks of its threads into
    the folder ``stacks``, and the rank that is behind shows them.
    """
    notice, over = _Notice(), threading.Event()
    ending, alone = Ending(notice), dist.get_world_size() == 1
    watchdog = None
    if heartbeat is not None:
        watchdog = Watchdog(heartbeat, notice.store, notice.key, dist.get_rank(), dist.get_world_size())
    arguments = (notice, over, ending, watchdog, stacks)
    threading.Thread(target=_watch, args=arguments, name="failures", daemon=True).start()
    try:
        yield ending
    except StoppedTogether:
        raise
    except (KeyboardInterrupt, SystemExit) as error:
        over.set()
        if alone:
            raise
        first = notice.post("was stopped", exit_code(error))
        code = exit_code(error) if first is None else first.code
        _exit_in(_CLOSE_SECONDS, code)
        if first is not None:  # by the launcher, for that reason
            raise SystemExit(code) from None
        raise
    except Exception as error:
        over.set()
        if alone:
            raise
        _heed_no_stops()
        code = 1 if show is None else exit_code(error)
        first = notice.post(mask(f"failed: {type(error).__name__}: {error}"), code)
        _exit_in(_CLOSE_SECONDS, code if first is None else first.code)
        if first is None:
            (show or _traceback)(error)
            time.sleep(_OTHERS_SECONDS)
            sys.exit(code)
        time.sleep(_FIRST_SECONDS)
        _say(first)
        sys.exit(first.code)
    finally:
        over.set()


def _traceback(error: Exception) -> int:
    trace = mask("".join(traceback.format_exception(error)))
    print(f"rank {dist.get_rank()} failed:", trace, sep="\n", file=sys.stderr)
    return 1


def _watch(
    notice: _Notice, over: threading.Event, ending: Ending, watchdog: Watchdog | None, stacks: Path | None
) -> None:
    while not over.wait(_poll_seconds(dist.get_world_size())):
        try:
            first = notice.read()
            if first is None and watchdog is not None and (hang := watchdog.look()):
                notice.post(hang[0], HUNG, behind=hang[1])
                first = notice.read()
        except RuntimeError:  # the rank that holds the store has ended, as it does when all is done
            return
        if first is not None and not over.wait(_FIRST_SECONDS):
            _exit_in(_CLOSE_SECONDS, first.code)
            _say(first)
            if first.code == HUNG:
                _dump_stacks(first, stacks)
            ending.at_end(first.code)
            over.wait(_FIRST_SECONDS)  # the launcher ends all when it sees that one did
            os._exit(first.code)


def _poll_seconds(ranks: int) -> float:
    """Between two questions of a rank, so that the store's process answers no more than it can."""
    return max(_POLL_SECONDS, ranks / _POLLS_A_SECOND)


def _dump_stacks(first: _End, folder: Path | None) -> None:
    """What every thread of this process is doing, for a reader."""
    if first.behind == dist.get_rank():
        print(f"rank {first.behind} is here:", file=sys.stderr, flush=True)
        faulthandler.dump_traceback(sys.stderr, all_threads=True)
    if folder is not None:
        folder.mkdir(parents=True, exist_ok=True)
        with (folder / f"rank{dist.get_rank()}.txt").open("w", encoding="utf-8") as file:
            print(first, file=file, flush=True)
            faulthandler.dump_traceback(file, all_threads=True)


def _exit_in(seconds: float, code: int) -> None:
    """End the process then, whatever it is waiting for."""
    timer = threading.Timer(seconds, os._exit, [code])
    timer.daemon = True
    timer.start()


def _heed_no_stops() -> None:
    if threading.current_thread() is threading.main_thread():
        for number in (signal.SIGTERM, signal.SIGINT, signal.SIGUSR1):
            signal.signal(number, signal.SIG_IGN)


def _say(first: _End) -> None:
    if first.code == MISTAKE:
        return
    if first.rank == dist.get_rank():
        print(first, file=sys.stderr, flush=True)
    elif os.environ.get("LOCAL_RANK", "0") == "0":
        print(f"rank {dist.get_rank()} ends, for {first}", file=sys.stderr, flush=True)
