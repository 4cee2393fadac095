"""Files: written whole or not at all, errors that say which one, and a hash of what a JSON file says."""

from __future__ import annotations

import json
import os
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import xxhash

__all__ = ["atomic_write", "naming_file", "seal"]


@contextmanager
def naming_file(path: str | os.PathLike[str]) -> Iterator[None]:
    """An OSError that does not say of which file it is, as of a full disk, says ``path``."""
    try:
        yield
    except OSError as error:
        if error.filename is not None or error.errno is None:
            raise
        raise OSError(error.errno, error.strerror, os.fspath(path)) from error


@contextmanager
def atomic_write(path: Path) -> Iterator[Path]:
    """A file beside ``path`` to write, which takes its place once the body is done, and goes if it fails.

    What is no plain file, such as ``/dev/stdout``, is written as it is.

    Raises:
        OSError: of ``path``, whatever was being done.
    """
    if path.exists() and not path.is_file():
        with naming_file(path):
            yield path
        return
    path = path.resolve()  # a link stays one
    partial = path.with_name(f"{path.stem}.{os.getpid()}.partial{path.suffix}")
    try:
        with naming_file(path):
            yield partial
            partial.replace(path)
    except BaseException as error:
        partial.unlink(missing_ok=True)
        if isinstance(error, OSError) and error.filename == str(partial):
            raise OSError(error.errno, error.strerror, str(path)) from error
        raise


def fingerprint(file: Path) -> dict[str, Any]:
    """What a manifest says of a file: its size in bytes and the XXH3 of its content."""
    digest = xxhash.xxh3_128()
    with file.open("rb") as stream:
        while block := stream.read(2**22):
            digest.update(block)
        return {"bytes": stream.tell(), "xxh3": digest.hexdigest()}


def seal(values: Mapping[str, Any]) -> str:
    """The XXH3 of plain values, whatever the order of their keys."""
    return xxhash.xxh3_128_hexdigest(json.dumps(values, sort_keys=True))
