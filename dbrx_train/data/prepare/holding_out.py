"""The held-out split of few documents: a fraction of them may be none, and a sample is asked for at least.

Documents are drawn by hash, and those below the fraction are held out. Where they fill no sample, the
fraction is raised to the next lowest draws, and the parts that hold these are made again.
"""

from __future__ import annotations

import json
import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from dbrx_train.data.manifest import write_json

__all__ = ["MOST_DRAWS", "is_stale", "kept_fraction", "raise_fraction"]

MOST_DRAWS = 64
"""Of a part, lowest first, that its mark knows."""


def is_stale(mark: dict[str, Any], fraction: float) -> bool:
    """Whether a part trains on what is to be held out."""
    return any(draw < fraction for draw, _ in mark["splits"]["train"]["drawn"])


def kept_fraction(work: Path) -> float | None:
    """What the fraction was raised to before a preparation was interrupted; None if it was not."""
    path = _file(work)
    return float(json.loads(path.read_text(encoding="utf-8"))["fraction"]) if path.is_file() else None


def raise_fraction(work: Path, marks: Sequence[dict[str, Any]], needs: int) -> float | None:
    """The fraction that holds ``needs`` tokens out, kept in ``work``.

    None where so many are held out already, or where fewer would be left to train on.
    """
    held, rest = (sum(mark["splits"][name]["tokens"] for mark in marks) for name in ("val", "train"))
    if held >= needs:
        return None
    drawn: dict[float, int] = {}
    for mark in marks:
        for draw, tokens in mark["splits"]["train"]["drawn"]:
            drawn[draw] = drawn.get(draw, 0) + tokens
    for draw in sorted(drawn)[:MOST_DRAWS]:
        held, rest = held + drawn[draw], rest - drawn[draw]
        if rest < needs:
            return None
        if held >= needs:
            fraction = math.nextafter(draw, 1)
            write_json(_file(work), {"fraction": fraction})
            return fraction
    return None


def _file(work: Path) -> Path:
    return work / "held-out.json"
