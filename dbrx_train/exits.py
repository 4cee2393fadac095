"""Every way out of the command line: one line on the screen and an exit code, at whatever moment.

Nothing but what Python has at hand is imported at the top, so that an interruption is heard from the first
import on. Training hears signals itself once it can save (``resilience/preemption.py``).
"""

from __future__ import annotations

import os
import signal
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from types import FrameType
from typing import Any, NoReturn

__all__ = ["begin", "hearing_alone", "resumable", "run", "warn_of_failure"]

_FIRST_SECONDS = 3.0  # for a host's first rank to make the same mistake
_SAME_SECONDS = 2.0  # a launcher may pass on what its whole group has been sent: that is one signal
_CLEANING_SECONDS = 10.0

_heard, _heard_at = 0, 0.0
_resumable = _over = False


def begin() -> None:
    """Hear Ctrl-C and SIGTERM for as long as the process lives; to be called first of all.

    What a signal interrupts is cleaned up, within ten seconds. Amid an import, where an exception may be
    swallowed or become another one, and once the command is over, the process exits at once.
    """
    _mend_streams()
    for number in (signal.SIGINT, signal.SIGTERM):
        if signal.getsignal(number) is not signal.SIG_IGN:  # as nohup and a shell's & want it
            signal.signal(number, _hear)
    for name in ("excepthook", "unraisablehook"):  # for what C code could not raise
        setattr(sys, name, _unless_heard(getattr(sys, name)))
    os.register_at_fork(after_in_child=_in_child)


def _mend_streams() -> None:
    """Standard streams that take whatever is printed: a closed one, or one of few letters, is no error."""
    for name in ("stdout", "stderr"):
        stream: Any = getattr(sys, name)
        if stream is None:
            setattr(sys, name, open(os.devnull, "w", encoding="utf-8"))  # noqa: SIM115
        else:
            stream.reconfigure(errors="backslashreplace")


def resumable() -> None:
    """From here on, to stop loses nothing: the same command goes on. A scheduler's signals say so, by 75."""
    global _resumable
    _resumable = True
    if signal.getsignal(signal.SIGTERM) is _hear:
        signal.signal(signal.SIGUSR1, _hear)


@contextmanager
def hearing_alone() -> Iterator[None]:
    """Within, no other handler of signals is taken: Composer has its own when it is imported."""
    real = signal.signal
    signal.signal = lambda number, _: signal.getsignal(number)  # type: ignore[assignment]
    try:
        yield
    finally:
        signal.signal = real


def run(command: Callable[[], object]) -> NoReturn:
    """Exit with what ``command`` comes to: the code that it returns or raises, or ``errors.exit_code``."""
    global _over
    from dbrx_train.errors import exit_code

    try:
        code = _outcome(command)
    except (SystemExit, KeyboardInterrupt) as error:
        code = exit_code(error)
    if _heard:
        code = _code()
        _say(_line())
    _over = True
    sys.exit(_flushed() or code)


@contextmanager
def warn_of_failure(what: str) -> Iterator[None]:
    """While a process ends: what fails in the body is a line, and not in the way of the rest."""
    import warnings

    from dbrx_train.errors import first_line

    try:
        yield
    except Exception as error:
        warnings.warn(f"{what} ({first_line(error)})", stacklevel=1)


def _outcome(command: Callable[[], object]) -> int:
    from dbrx_train import logs
    from dbrx_train.errors import MISTAKE, show

    try:
        logs.begin()
        code = command()
        if code == 128 + signal.SIGINT and not _heard:  # that is what typer makes of KeyboardInterrupt
            _say("interrupted (Ctrl-C)")
        return code if isinstance(code, int) else 0
    except Exception as error:
        if _heard:  # which something has made another error of
            return _code()
        if (usage := getattr(error, "format_message", None)) is not None:  # typer's own
            _say_usage(error, usage())
            return MISTAKE
        # Ranks that have met say whose error it is; before, all make the same mistake: once a host will do.
        # A launcher passes on the code of the first that exits, and ends the others wherever they are.
        first = os.environ.get("LOCAL_RANK", "0") == "0"
        code = show(error, quiet=not first)
        if not first:
            time.sleep(_FIRST_SECONDS)
        return code


def _say_usage(error: Any, message: str) -> None:
    if "\n" in message.strip():  # the help, where no command was given
        print(message, file=sys.stderr)
        return
    path = getattr(getattr(error, "ctx", None), "command_path", "dbrx-train")
    _say(f"{message.strip().rstrip('.')} (see {path} --help)")


def _hear(number: int, frame: FrameType | None) -> None:
    global _heard, _heard_at
    if _heard and time.monotonic() - _heard_at < _SAME_SECONDS:
        return
    at_once = bool(_heard) or _over or _is_importing(frame)
    _heard, _heard_at = _heard or number, time.monotonic()
    if at_once:
        _end()
    import threading

    timer = threading.Timer(_CLEANING_SECONDS, _end)
    timer.daemon = True
    timer.start()
    raise SystemExit(_code())


def _in_child() -> None:
    """A process forked from this one hears signals as any does."""
    for number, usual in ((signal.SIGINT, signal.default_int_handler), (signal.SIGTERM, signal.SIG_DFL)):
        if signal.getsignal(number) is _hear:
            signal.signal(number, usual)


def _end() -> None:
    _say(_line())
    os._exit(_code())


def _is_importing(frame: FrameType | None) -> bool:
    while frame is not None:
        if frame.f_code.co_filename.startswith("<frozen importlib"):
            return True
        frame = frame.f_back
    return False


def _code() -> int:
    from dbrx_train.errors import STOPPED

    return STOPPED if _resumable and _heard != signal.SIGINT else 128 + _heard


def _line() -> str:
    why = "Ctrl-C" if _heard == signal.SIGINT else signal.Signals(_heard).name
    return f"interrupted ({why}){'; the same command goes on' if _resumable else ''}"


def _say(line: str) -> None:
    """Once a host, past buffers that may be in the midst of a write."""
    if os.environ.get("LOCAL_RANK", "0") == "0":
        with suppress(OSError):  # nobody listens
            os.write(2, f"dbrx-train: {line}\n".encode())


def _flushed() -> int:
    """0 once what was printed has reached its reader; else an exit code."""
    from dbrx_train.errors import MISTAKE

    try:
        sys.stdout.flush()
        return 0
    except BrokenPipeError:  # the reader left, as head does
        code = 1
    except OSError as error:
        _say(f"standard output: {error.strerror}")
        code = MISTAKE
    nowhere = os.open(os.devnull, os.O_WRONLY)  # for what is still in the buffer, when Python ends
    os.dup2(nowhere, sys.stdout.fileno())
    return code


def _unless_heard(hook: Callable[..., Any]) -> Callable[..., Any]:
    def quiet(*arguments: Any) -> None:
        if not _heard:
            hook(*arguments)

    return quiet
