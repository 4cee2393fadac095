"""fastText's models, for prediction."""

from __future__ import annotations

import os
from functools import lru_cache
from typing import Any

__all__ = ["load_model"]


def load_model(path: str) -> Any:
    """The model of a ``.bin`` or ``.ftz`` file.

    Raises:
        ValueError: there is no such file, or it is no model.
    """
    if not os.path.isfile(path):
        raise ValueError(f"{path}: no such file; it must be a fastText model")
    return _load(path, os.stat(path).st_mtime_ns)


@lru_cache(maxsize=4)
def _load(path: str, written: int) -> Any:
    """Read anew where the file is newer than ``written``."""
    import fasttext

    try:
        return fasttext.load_model(path)
    except (ValueError, RuntimeError, MemoryError) as error:
        raise ValueError(f"{path}: no fastText model ({error})") from error
