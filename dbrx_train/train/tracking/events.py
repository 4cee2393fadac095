"""What happened to a run, a line each: ``events.jsonl`` in its folder."""

from __future__ import annotations

import math
import time
import warnings
from pathlib import Path
from typing import Any

from composer.utils import dist

from dbrx_train.errors import first_line
from dbrx_train.jsonl import EVENTS, append

__all__ = ["record"]


def record(folder: Path, kind: str, *, step: int, tokens: int, **facts: Any) -> None:
    """Append ``{"time": unix seconds, "step", "tokens", "kind", ...}`` to a run's events, on rank 0.

    ``step`` and ``tokens`` are those that the run had behind it. Numbers that are not finite, for which JSON
    has no word, become strings. A file that cannot be written is a warning.
    """
    if dist.get_global_rank() != 0:
        return
    event = {"time": round(time.time(), 3), "step": step, "tokens": tokens, "kind": kind, **facts}
    plain = {key: _plain(value) for key, value in event.items()}
    try:
        append(folder / EVENTS, plain)
    except OSError as error:  # a full disk is no reason to stop training
        warnings.warn(f"{folder / EVENTS}: {kind} is not kept ({first_line(error)})", stacklevel=1)


def _plain(value: Any) -> Any:
    return str(value) if isinstance(value, float) and not math.isfinite(value) else value
