"""Content of a file, decompressed, once it is known to be what its name says."""

from __future__ import annotations

import io
import os
import re
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

__all__ = ["COMPRESSION", "holds_array", "open_content"]

COMPRESSION = {".gz": "gzip", ".zst": "zstd"}
BUFFER = 1 << 20

_HEAD = 64
_BOM = b"\xef\xbb\xbf"
# UTF-32 first, as its mark begins with that of UTF-16
_ENCODINGS = {
    b"\xff\xfe\x00\x00": "UTF-32",
    b"\x00\x00\xfe\xff": "UTF-32",
    b"\xff\xfe": "UTF-16",
    b"\xfe\xff": "UTF-16",
}
_FORMATS = {
    rb"\x1f\x8b\x08": "gzip, which is read from files ending in .gz",
    rb"\x28\xb5\x2f\xfd": "Zstandard, which is read from files ending in .zst",
    rb"PK\x03\x04": "a zip archive; unpack it",
    rb"BZh[1-9]1AY&SY": "bzip2; unpack it",
    rb"\xfd7zXZ\x00": "xz; unpack it",
    rb"PAR1": "Parquet, which is read from files ending in .parquet",
}


@contextmanager
def open_content(path: str, start: int = 0) -> Iterator[tuple[io.BufferedReader, Callable[[], int]]]:
    """The file's bytes from ``start`` on, decompressed as its name says, and how far into the file they go.

    Raises:
        ValueError: the file is in an encoding other than UTF-8, or of another format than text.
    """
    with open(path, "rb", buffering=0) as raw:
        compression = COMPRESSION.get(os.path.splitext(path)[1])
        if compression is None:
            _check(raw.read(_HEAD), path)
            raw.seek(start)
        with io.BufferedReader(_decompressed(raw, compression), BUFFER) as stream:
            if compression is not None:
                _check(stream.peek(_HEAD), path)
            yield stream, raw.tell


def holds_array(path: str) -> bool:
    """Whether the file's JSON is an array, rather than a line for each object."""
    try:
        with open_content(path) as (stream, _):
            return stream.peek(BUFFER).removeprefix(_BOM).lstrip().startswith(b"[")
    except OSError as error:
        if error.errno is None:  # pyarrow's, about the content
            raise ValueError(f"{path}: damaged ({error})") from error
        raise


def _decompressed(raw: io.FileIO, compression: str | None) -> Any:
    if compression is None:
        return raw
    import pyarrow as pa

    return pa.CompressedInputStream(raw, compression)


def _check(head: bytes, path: str) -> None:
    for mark, encoding in _ENCODINGS.items():
        if head.startswith(mark):
            _refuse_encoding(path, encoding)
    pairs = head[: min(len(head), _HEAD) // 2 * 2]
    if len(pairs) > 8:  # without a mark, the NUL bytes of Latin letters tell
        for zeros, letters, encoding in (
            (pairs[1::2], pairs[::2], "UTF-16LE"),
            (pairs[::2], pairs[1::2], "UTF-16BE"),
        ):
            if not any(zeros) and all(letters):
                _refuse_encoding(path, encoding)
    for magic, name in _FORMATS.items():
        if re.match(magic, head):
            raise ValueError(f"{path}: is not text but {name}")


def _refuse_encoding(path: str, encoding: str) -> None:
    raise ValueError(
        f"{path}: is {encoding}, and must be UTF-8; convert it: iconv -f {encoding} -t UTF-8 FILE > NEW"
    )
