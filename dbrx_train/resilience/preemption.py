"""What asks a process to stop, and how long it may take over it."""

from __future__ import annotations

import os
import select
import signal
import socket
import sys
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from types import FrameType, TracebackType
from typing import Any

import psutil

from dbrx_train.errors import STOPPED

__all__ = ["TIME_LIMIT", "PreemptionHandler", "cause", "code_when_saved"]

TIME_LIMIT = 1000
"""Reason to stop, beside the numbers of signals."""

_SIGNALS = (signal.SIGTERM, signal.SIGUSR1, signal.SIGINT)
_SAME_SECONDS = 2.0  # a launcher may pass on what its whole group has been sent: that is one signal
_STARTING_SECONDS = 10.0  # to end where nothing need be saved
_TELL_SECONDS = 5.0  # for the ranks to end that are told


def cause(number: int) -> str:
    """Why a run stops, for a reader: a signal's name, or the time limit."""
    names = {TIME_LIMIT: "stop_after", signal.SIGINT: "Ctrl-C"}
    return names.get(number) or signal.Signals(number).name


def code_when_saved(number: int) -> int:
    """What a run that stops for this reason exits with once nothing would be lost: a person's Ctrl-C is no
    reason for a supervisor to start it again."""
    return 128 + signal.SIGINT if number == signal.SIGINT else STOPPED


class PreemptionHandler:
    """Hears SIGTERM, SIGUSR1 and Ctrl-C, and the time limit, for as long as it is entered.

    Before training begins, a signal raises SystemExit with ``code_when_saved``. After that it is only noted:
    training asks between steps, and saves. When ``grace`` is over, or at a second signal, the process exits
    wherever it is: with that code if nothing would be lost, else as if the signal had killed it. A thread
    sees to this, since a process that waits in a collective runs no signal handler of Python's.

    Args:
        grace: seconds that saving and ending may take.
        after: seconds since the process began at which to stop; None: never.
    """

    def __init__(self, grace: float, after: float | None) -> None:
        self.safe = True
        """Nothing would be lost by exiting now."""
        self.tell: Callable[[str, int], None] = lambda what, code: None
        """Tells the other ranks why this one exits, and with what code."""
        self._grace, self._training, self._leaving, self._number = grace, False, False, 0
        self._heard_at: float | None = None
        age = time.time() - psutil.Process().create_time()
        self._deadline = None if after is None else time.monotonic() + after - age
        self._before: dict[int, Any] = {}

    def __enter__(self) -> PreemptionHandler:
        global _listening
        if threading.current_thread() is threading.main_thread():  # others may handle no signals
            self._wakes, self._hears = socket.socketpair()
            self._wakes.setblocking(False)
            self._before = {number: signal.signal(number, self._handle) for number in _SIGNALS}
            self._old_wakeup = signal.set_wakeup_fd(self._wakes.fileno(), warn_on_full_buffer=False)
            _listening = True
            threading.Thread(target=self._listen, name="stop", daemon=True).start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, _: TracebackType | None
    ) -> None:
        global _listening
        if not self._before:
            return
        _listening = False
        signal.set_wakeup_fd(self._old_wakeup)
        # A launcher sends the last ranks a signal when the first have exited; they are on their way.
        leaving = isinstance(error, SystemExit) and "LOCAL_RANK" in os.environ
        for number, before in self._before.items():
            signal.signal(number, signal.SIG_IGN if leaving else before)
        self._wakes.close()

    @contextmanager
    def before_training(self) -> Iterator[None]:
        """What a signal raises in the body before training begins stays what it is.

        Amid an import or in C code it may become another error.
        """
        try:
            yield
        except Exception:
            if self._leaving:
                raise SystemExit(code_when_saved(self._number)) from None
            raise

    def begin_training(self) -> None:
        """From here on, to exit would lose what was done since the last checkpoint."""
        if not self._training:
            self._training, self.safe = True, False

    @property
    def training(self) -> bool:
        return self._training

    def asked(self) -> int:
        """The reason to stop that this process knows of: a signal's number, or TIME_LIMIT; 0 for none."""
        if not self._number and self._deadline is not None and time.monotonic() > self._deadline:
            return TIME_LIMIT
        return self._number

    def begin(self, number: int) -> None:
        """Note that the run stops; from now on counts the grace."""
        if not self._number:
            self._number, self._heard_at = number, time.monotonic()
            if self._before:
                self._wakes.send(b"\0")

    def _handle(self, number: int, frame: FrameType | None) -> None:
        if not (self._training or self._leaving):  # a second one must not cut off what the first began
            self._leaving, self._number = True, self._number or number
            raise SystemExit(code_when_saved(number))

    def _listen(self) -> None:
        while True:
            ready, *_ = select.select([self._hears], [], [], self._left())
            if ready:
                heard = self._hears.recv(64)
                if not heard:
                    return
                for number in heard:
                    if number in _SIGNALS:
                        self._hear(number)
            if self._left() == 0:
                self._give_up()

    def _left(self) -> float | None:
        """Seconds that the process still has; None before it is to stop."""
        if not self._number or self._heard_at is None:
            return None
        return max(0.0, self._heard_at + self._seconds - time.monotonic())

    @property
    def _seconds(self) -> float:
        return self._grace if self._training else min(self._grace, _STARTING_SECONDS)

    def _hear(self, number: int) -> None:
        if self._heard_at is not None:
            if time.monotonic() - self._heard_at > _SAME_SECONDS:
                os._exit(self._code(number))
            return
        self._number, self._heard_at = number, time.monotonic()
        if self._training:
            what = "all is saved, and it ends" if self.safe else "saves after this step, and stops"
            self._say(f"{cause(number)}: {what}; a second one ends it at once")

    def _give_up(self) -> None:
        code = self._code(self._number)
        lost = "" if self.safe else ", and did not save in time"
        what = f"was to stop ({cause(self._number)}) within {self._seconds:g} s{lost}"
        self._say(what)
        self.tell(what, code)
        time.sleep(_TELL_SECONDS)
        os._exit(code)

    def _code(self, number: int) -> int:
        if self.safe:
            return code_when_saved(number)
        return 128 + (signal.SIGTERM if number == TIME_LIMIT else number)

    def _say(self, what: str) -> None:
        if os.environ.get("LOCAL_RANK", "0") == "0":
            print(f"dbrx-train: {what}", file=sys.stderr, flush=True)


_listening = False


def _in_child() -> None:
    """A process forked from this one shares none of this."""
    global _listening
    if _listening:
        _listening = False
        signal.set_wakeup_fd(-1)
        for number in _SIGNALS:
            signal.signal(number, signal.SIG_DFL)


os.register_at_fork(after_in_child=_in_child)
