"""What a process says (``DBRX_TRAIN_LOG=debug`` in the environment for all of it), and to whom."""

from __future__ import annotations

import logging
import os
import sys
import warnings
from pathlib import Path
from typing import Any, TextIO, cast

from dbrx_train.errors import first_line
from dbrx_train.redact import mask, mask_logs

__all__ = ["begin", "outlive_readers"]

_LEVELS = ("debug", "info", "warning")


def begin() -> None:
    """Show the records of this process on stderr, with its rank and the time, secrets masked.

    Warnings, and errors that other libraries record, are a line each; with "debug" in full.

    Raises:
        ValueError: DBRX_TRAIN_LOG is no level.
    """
    mask_logs()
    warnings.formatwarning = _warning
    level = os.environ.get("DBRX_TRAIN_LOG", "warning")
    if level not in _LEVELS:
        raise ValueError(f"DBRX_TRAIN_LOG: {level!r} is not one of {', '.join(_LEVELS)}")
    if level != "debug":
        _shorten_records()
    handler = logging.StreamHandler()
    rank = os.environ.get("RANK", "0")
    handler.setFormatter(logging.Formatter(f"%(asctime)s rank {rank} %(name)s: %(message)s"))
    logger = logging.getLogger("dbrx_train")
    logger.handlers = [handler]
    logger.setLevel(level.upper())
    logger.propagate = False


def _warning(
    message: Warning | str, category: type[Warning], filename: str, lineno: int, line: str | None = None
) -> str:
    """One of ours without the place in the code, which means nothing to its reader, and from one rank."""
    if not Path(filename).is_relative_to(Path(__file__).parent):
        return mask(f"{filename}:{lineno}: {message}\n")
    return mask(f"dbrx-train: warning: {message}\n") if os.environ.get("RANK", "0") == "0" else ""


def _shorten_records() -> None:
    """Have every record of an exception say its first line, in place of the traceback."""
    make = logging.getLogRecordFactory()

    def short(*args: Any, **kwargs: Any) -> logging.LogRecord:
        record = make(*args, **kwargs)
        if isinstance(record.exc_info, tuple) and record.exc_info[1] is not None:
            record.msg = f"{record.msg} ({mask(first_line(record.exc_info[1]))})"
            record.exc_info = record.exc_text = record.stack_info = None
        return record

    logging.setLogRecordFactory(short)


def outlive_readers() -> None:
    """From here on it is no error that output cannot be written: its reader left, as ``| head`` does, the
    terminal was closed, or the disk of a log is full."""
    sys.stdout, sys.stderr = (cast(TextIO, _Outliving(stream)) for stream in (sys.stdout, sys.stderr))


class _Outliving:
    """A stream that goes on into nothing once nothing can be written."""

    def __init__(self, stream: TextIO) -> None:
        self._stream = stream

    def __getattr__(self, name: str) -> Any:
        return getattr(self._stream, name)

    def write(self, text: str) -> int:
        try:
            return self._stream.write(text)
        except OSError:
            self._leave()
            return len(text)

    def flush(self) -> None:
        try:
            self._stream.flush()
        except OSError:
            self._leave()

    def _leave(self) -> None:
        nowhere = os.open(os.devnull, os.O_WRONLY)
        os.dup2(nowhere, self._stream.fileno())
        os.close(nowhere)
        if self is sys.stdout:
            print("dbrx-train: nobody reads standard output any more; training goes on", file=sys.stderr)
