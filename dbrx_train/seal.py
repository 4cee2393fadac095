"""A hash by which a JSON file can tell whether it says what was written."""

from __future__ import annotations

import json
from collections.abc import Mapping
from typing import Any

import xxhash

__all__ = ["seal"]


def seal(values: Mapping[str, Any]) -> str:
    """The XXH3 of plain values, whatever the order of their keys."""
    return xxhash.xxh3_128_hexdigest(json.dumps(values, sort_keys=True))
