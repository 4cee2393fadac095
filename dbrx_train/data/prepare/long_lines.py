"""Parts of JSON too long to hold in memory: one string field of a line, the elements of an array.

It is scanned through a memory map: tokens are found as spans, and only what is wanted is decoded, a string
piece by piece. It is not checked to be valid JSON beyond what that needs.
"""

from __future__ import annotations

import json
import mmap
import re
from collections.abc import Iterator, Sequence

__all__ = ["array_elements", "string_chunks"]

CHUNK = 1 << 20

Json = bytes | memoryview | mmap.mmap

# Possessive throughout: a backtracking group would remember each of a billion characters.
_TOKEN = re.compile(rb'\s*+(?:"([^"\\]*+(?:\\.[^"\\]*+)*+)"|([{}\[\]:,])|([^\s{}\[\]:,"]++))', re.DOTALL)
# Whole characters and escapes; a surrogate pair's two escapes stay together.
_UNITS = re.compile(
    rb"(?:[^\\]++|\\[^u]|\\u(?![dD][89abAB])[0-9a-fA-F]{4}|\\u[dD][89abAB][0-9a-fA-F]{2}\\u[0-9a-fA-F]{4})*+"
)


def string_chunks(line: Json, field: str, where: str, option: str = "--text-field") -> Iterator[str]:
    """Text of the string ``field`` in pieces of about a million bytes; ``a.b`` may be field b of field a.

    Bytes that are no UTF-8 come out as lone surrogates. Raises ValueError, beginning with ``where``, when
    the line is no JSON object with such a field, which ``option`` chose.
    """
    found = _find(line, [field], where)
    if found is None and "." in field:
        found = _find(line, field.split("."), where)
    if found is None:
        raise ValueError(f"{where}: no field {field!r} (choose with {option})")
    start, stop = found
    while start < stop:
        end = _whole_units(line, start, min(start + CHUNK, stop), stop)
        try:
            yield json.loads(f'"{bytes(line[start:end]).decode("utf-8", "surrogateescape")}"')
        except ValueError as error:
            raise ValueError(f"{where}: not valid JSON ({error})") from error
        start = end


def array_elements(data: Json, where: str) -> Iterator[tuple[int, int]]:
    """Where each element of a JSON array lies, blanks around it included; its JSON is not looked into.

    Raises:
        ValueError: beginning with ``where``: the array does not end, or something follows it.
    """
    first = _TOKEN.match(data, 3 if data[:3] == b"\xef\xbb\xbf" else 0)
    assert first is not None
    assert first[2] == b"["
    depth, number, begin = 1, 0, first.end()
    position = begin
    while depth and (token := _TOKEN.match(data, position)):
        position, mark = token.end(), token[2]
        if mark in (b"{", b"["):
            depth += 1
        elif mark in (b"}", b"]"):
            depth -= 1
        if depth == 0 and not number and not bytes(data[begin : token.start(2)]).strip():
            break  # no element at all
        if depth == 0 or (mark == b"," and depth == 1):
            yield begin, token.start(2)
            number, begin = number + 1, position
    if depth or _TOKEN.match(data, position):
        raise ValueError(f"{where}: not valid JSON (the array does not end, or has something after it)")


def _find(line: Json, path: Sequence[str], where: str) -> tuple[int, int] | None:
    """Where the characters of the string lie; of no string, an empty span, and None without the field."""
    depth, opened, position, name, is_value = 0, 0, 0, "", False
    while token := _TOKEN.match(line, position):
        position = token.end()
        start, stop = token.span(1)
        mark = token[2]
        here = depth == opened + 1  # among the fields of the innermost object of the path so far
        if here and is_value and name == path[opened] and mark != b":":
            if opened + 1 == len(path):
                if start < 0 and token[3] != b"null":
                    raise ValueError(f"{where}: field {'.'.join(path)!r} must hold text")
                return max(start, 0), max(stop, 0)
            if token[3] == b"null":
                return 0, 0
            if mark == b"{":
                opened, is_value = opened + 1, False
        if mark in (b"{", b"["):
            depth += 1
        elif mark in (b"}", b"]"):
            depth -= 1
            if depth == opened > 0:
                opened -= 1
        elif mark == b":" and here:
            is_value = True
        elif mark == b"," and here:
            is_value = False
        elif start >= 0 and here and not is_value:
            name = json.loads(b'"' + line[start:stop] + b'"') if stop - start < 1 << 16 else ""
    if depth or bytes(line[position:]).strip():
        raise ValueError(f"{where}: not valid JSON (byte {position} of the line)")
    return None


def _whole_units(line: Json, start: int, end: int, stop: int) -> int:
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
