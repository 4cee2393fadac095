"""One string field out of a JSON line too long to hold in memory.

The line is scanned through a memory map: tokens are found as spans, and only the wanted string is
decoded, piece by piece. It is not checked to be valid JSON beyond what that needs.
"""

from __future__ import annotations

import json
import mmap
import re
from collections.abc import Iterator

__all__ = ["string_chunks"]

CHUNK = 1 << 20

# Possessive throughout: a backtracking group would remember each of a billion characters.
_TOKEN = re.compile(rb'\s*+(?:"([^"\\]*+(?:\\.[^"\\]*+)*+)"|([{}\[\]:,])|([^\s{}\[\]:,"]++))', re.DOTALL)
# Whole characters and escapes; a surrogate pair's two escapes stay together.
_UNITS = re.compile(
    rb"(?:[^\\]++|\\[^u]|\\u(?![dD][89abAB])[0-9a-fA-F]{4}|\\u[dD][89abAB][0-9a-fA-F]{2}\\u[0-9a-fA-F]{4})*+"
)


def string_chunks(line: mmap.mmap, field: str, where: str) -> Iterator[str]:
    """Text of the top-level string ``field`` in pieces of about a million bytes.

    Bytes that are no UTF-8 come out as lone surrogates. Raises ValueError, beginning with ``where``, when
    the line is no JSON object with such a field.
    """
    start, stop = _find(line, field, where)
    while start < stop:
        end = _whole_units(line, start, min(start + CHUNK, stop), stop)
        try:
            yield json.loads(f'"{line[start:end].decode("utf-8", "surrogateescape")}"')
        except ValueError as error:
            raise ValueError(f"{where}: not valid JSON ({error})") from error
        start = end


def _find(line: mmap.mmap, field: str, where: str) -> tuple[int, int]:
    """Where the string's characters lie."""
    depth, position, name, is_value = 0, 0, "", False
    while token := _TOKEN.match(line, position):
        position = token.end()
        start, stop = token.span(1)
        mark = token[2]
        if depth == 1 and is_value and name == field and mark != b":":
            if start < 0 and token[3] != b"null":
                raise ValueError(f"{where}: field {field!r} must hold text")
            return max(start, 0), max(stop, 0)
        if mark in (b"{", b"["):
            depth += 1
        elif mark in (b"}", b"]"):
            depth -= 1
        elif mark == b":" and depth == 1:
            is_value = True
        elif mark == b"," and depth == 1:
            is_value = False
        elif start >= 0 and depth == 1 and not is_value:
            name = json.loads(b'"' + line[start:stop] + b'"') if stop - start < 1 << 16 else ""
    if depth or line[position:].strip():
        raise ValueError(f"{where}: not valid JSON (byte {position} of the line)")
    raise ValueError(f"{where}: no field {field!r} (choose with --text-field)")


def _whole_units(line: mmap.mmap, start: int, end: int, stop: int) -> int:
    """The last position up to ``end`` that splits neither an escape nor a character."""
    if end == stop:
        return stop
    match = _UNITS.match(line, start, end)
    assert match is not None
    end = match.end()
    for _ in range(3):
        if end < stop and line[end] & 0xC0 == 0x80:
            end -= 1
    return end if end > start else min(start + 6, stop)
