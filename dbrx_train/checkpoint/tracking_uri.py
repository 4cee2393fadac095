"""Where a run is tracked, as a URI says it."""

from __future__ import annotations

from pathlib import Path

from sqlalchemy.engine import make_url
from sqlalchemy.exc import ArgumentError

__all__ = ["sqlite_file"]


def sqlite_file(uri: str) -> Path | None:
    """The file of an SQLite store; None for any other store."""
    try:
        url = make_url(uri)
    except ArgumentError:
        return None
    return Path(url.database) if url.get_backend_name() == "sqlite" and url.database else None
