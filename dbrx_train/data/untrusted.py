"""What the index of a shard folder may ask for: it may come from anyone."""

from __future__ import annotations

import re
from collections.abc import Mapping
from pathlib import Path, PurePosixPath
from typing import Any

__all__ = ["check_shard"]

_PLAIN = re.compile(r"(ndarray|bytes|str|json|u?int|float)\w*(:.*)?")
"""Encodings of columns that are read without running code; ``pkl`` is not."""


def check_shard(index: Path, shard: Mapping[str, Any]) -> None:
    """Hold an index's entry of a shard against what reading it may do.

    Raises:
        ValueError: it names a file outside of its folder, or a column that would be unpickled.
    """
    try:
        encodings = dict(zip(shard["column_names"], shard["column_encodings"], strict=True))
        names = [shard[form]["basename"] for form in ("raw_data", "zip_data") if shard[form]]
    except (KeyError, TypeError, ValueError):
        raise ValueError(
            f"{index}: describes a shard otherwise than MDS does; prepare the data again"
        ) from None
    for name in names:
        path = PurePosixPath(str(name))
        if path.is_absolute() or ".." in path.parts or "\\" in str(name):
            raise ValueError(f"{index}: names {name!r}; must name files in its folder alone")
    for column, encoding in encodings.items():
        if not _PLAIN.fullmatch(str(encoding)):
            raise ValueError(
                f"{index}: column {column} is stored as {encoding}, which to read may run code; must be "
                f"stored as ndarray, bytes, str, json or numbers"
            )
