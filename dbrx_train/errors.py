"""How an error is shown to a user: a mistake of theirs in one line, anything else in full."""

from __future__ import annotations

import difflib
import errno
import os
import sys
import traceback
from collections.abc import Iterable
from typing import TYPE_CHECKING

from dbrx_train.redact import mask

if TYPE_CHECKING:
    import yaml

__all__ = [
    "HUNG",
    "MISTAKE",
    "STOPPED",
    "Stopped",
    "aside",
    "check_exists",
    "exit_code",
    "first_line",
    "nearest",
    "seen_from",
    "show",
    "where_and_what",
]

_RENAMED = {
    "hangs": "watchdog",
    "stopping": "preemption",
    "grace": "grace_period",
    "deviations": "mad_threshold",
    "pass_over": "skip_data",
    "reach": "interpolation",
}
"""Keys as they were once called."""

MISTAKE = 2
"""Exit code: the user's input is wrong."""

STOPPED = 75
"""Exit code (sysexits' EX_TEMPFAIL): stopped as asked, with all that was done saved; start it again."""
HUNG = 74
"""Exit code: no progress for too long."""


class Stopped(Exception):
    """The run cannot go on, and its message says all that there is to say; exit code 1."""


def exit_code(error: BaseException | None) -> int:
    """What a process that ends with ``error`` exits with, if nothing else is said of it."""
    if isinstance(error, SystemExit):
        return error.code if isinstance(error.code, int) else int(error.code is not None)
    if isinstance(error, Stopped) or not isinstance(error, Exception) or _mistake(error) is None:
        return 130 if isinstance(error, KeyboardInterrupt) else int(error is not None)
    return MISTAKE


def show(error: Exception, quiet: bool = False) -> int:
    """Print ``error``; returns ``exit_code`` of it. ``quiet``: not a mistake."""
    line, rank = _mistake(error), os.environ.get("RANK", "0")
    where = "" if rank == "0" else f" (rank {rank})"
    if isinstance(error, Stopped):
        print(f"dbrx-train{where}: {mask(str(error))}", file=sys.stderr, flush=True)
    elif line is None or (isinstance(error, ValueError) and os.environ.get("DBRX_TRAIN_LOG") == "debug"):
        trace = mask("".join(traceback.format_exception(error)))
        print(f"dbrx-train{where}:", trace, file=sys.stderr, flush=True)
    elif not quiet:
        print(f"dbrx-train{where}: {mask(line)}", file=sys.stderr, flush=True)
    return exit_code(error)


def _mistake(error: Exception) -> str | None:
    """One line for what the user got wrong; None for anything else."""
    if isinstance(error, ValueError):
        return str(error)
    if isinstance(error, OSError) and error.filename is not None and error.strerror is not None:
        missing = isinstance(error, FileNotFoundError) and isinstance(error.filename, str)
        return f"{error.filename}: {error.strerror}{seen_from(error.filename) if missing else ''}"
    if isinstance(error, OSError) and error.errno in (errno.ENOSPC, errno.EDQUOT):  # as of standard output
        return error.strerror
    if isinstance(error, ModuleNotFoundError) and error.name and not error.name.startswith("dbrx_train"):
        return f"{error.name} is not installed; this needs: pip install 'dbrx-train[train]'"
    return None


def check_exists(path: str | os.PathLike[str]) -> None:
    """Raise ValueError if there is no file or folder of that name."""
    if not os.path.lexists(path):
        raise ValueError(f"{os.fspath(path)}: no such file or folder{seen_from(path)}")


def seen_from(path: str | os.PathLike[str]) -> str:
    """To follow that there is no ``path``: the folder that it was looked for in, if it is relative."""
    if os.path.isabs(path):
        return ""
    try:
        return f", seen from {os.getcwd()}"
    except FileNotFoundError:
        return ", seen from a folder that was deleted"


def aside(line: str) -> None:
    """Say what is no result: on standard error."""
    print(line, file=sys.stderr, flush=True)


def first_line(error: BaseException) -> str:
    """An error's message, or its name where it has none, cut to one line."""
    return (str(error).strip() or type(error).__name__).splitlines()[0]


def where_and_what(error: yaml.YAMLError) -> tuple[str, str]:
    """Of text that is no YAML: ``, line N`` if that is known, and what is wrong there, in a line."""
    place = getattr(error, "problem_mark", None)
    line = f", line {place.line + 1}" if place else ""
    return line, getattr(error, "problem", None) or first_line(error)


def nearest(name: str, known: Iterable[str]) -> str:
    """The end of a line about a name that is not ``known``: which one may have been meant."""
    names = [*map(str, known)]
    if _RENAMED.get(name) in names:
        return f"; it is called {_RENAMED[name]} now"
    close = difflib.get_close_matches(name, names, n=1, cutoff=0.5)
    return f"; did you mean {close[0]}?" if close else f"; known: {', '.join(names)}"
