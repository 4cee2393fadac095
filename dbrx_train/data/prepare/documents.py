"""From a span of a file to its documents, each a stream of bounded pieces of text."""

from __future__ import annotations

import codecs
import io
import json
import mmap
import os
import re
import tempfile
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from functools import lru_cache, partial
from typing import Any, Protocol

from dbrx_train.data.prepare.long_lines import string_chunks
from dbrx_train.data.prepare.sources import COMPRESSION, Span, open_parquet

__all__ = ["Listener", "Place", "cut", "documents", "mended", "rows"]

CHUNK = 1 << 20
LONG_LINE = 1 << 24
"""Bytes above which a JSON line is read through a memory map."""

_SURROGATE = re.compile("[\ud800-\udfff]")
# Between these characters cl100k_base's pattern splits whatever stands around them: after a line break
# that is followed by no blank, and before a single space within text.
_SAFE_CUT = re.compile(r"\n(?=\S)|(?<=\S)(?= \S)")
_CUT_WINDOW = 1 << 16


Place = Callable[[], str]
"""Gives ``FILE`` or ``FILE:LINE``; a function, as counting lines up to the place takes time."""


class Listener(Protocol):
    """Hears what a reader comes across."""

    def problem(self, kind: str, where: Place) -> None:
        """``kind`` of trouble met, and mended, at ``where``."""

    def advance(self, size: int) -> None:
        """``size`` more bytes of the file have been read."""


def documents(span: Span, text_field: str, listener: Listener) -> Iterator[tuple[Place, Iterator[str]]]:
    """Each document of the span: its place, and its text in pieces, to be taken before the next document.

    A text file is one document, a line of JSON or a row of Parquet likewise; null text is an empty
    document. Text is UTF-8 (a byte order mark is dropped); bytes that are none become U+FFFD and are
    reported as ``undecodable``. Line ends are kept as they are.

    Raises:
        ValueError: ``FILE:LINE: …`` for a line that is no JSON object with such a text field; ``FILE: …``
            for a damaged file.
    """
    try:
        if span.kind == "text":
            yield (lambda: span.path), _text(span, listener)
        elif span.kind == "jsonl":
            yield from _json_lines(span, text_field, listener)
        else:
            yield from _parquet_rows(span, text_field, listener)
    except OSError as error:
        if error.errno is None:  # pyarrow's, about the content
            raise ValueError(f"{span.path}: damaged ({error})") from error
        raise


def cut(chunks: Iterable[str], size: int = CHUNK) -> Iterator[str]:
    """Regroup text into pieces of ``size`` to ``size`` + one chunk characters, for tokenizing one by one.

    The ids are those of the whole text, as each cut lies where cl100k_base splits anyway. Only where
    64 Ki characters in a row offer no such place (no word and no line ends) is the cut arbitrary, and
    the two or three tokens next to it may differ.
    """
    held = ""
    for chunk in chunks:
        held += chunk
        start = 0
        while len(held) - start > size:
            end = start + size
            window = _SAFE_CUT.finditer(held, max(start, end - _CUT_WINDOW), end + 2)
            at = max((match.end() for match in window if start < match.end() <= end), default=end)
            yield held[start:at]
            start = at
        held = held[start:]
    if held:
        yield held


@contextmanager
def _open(span: Span, listener: Listener) -> Iterator[tuple[io.BufferedReader, Callable[[], None]]]:
    """The span's file, decompressed, at ``span.start``, and a function that reports how far it was read."""
    with open(span.path, "rb", buffering=0) as raw:
        raw.seek(span.start)
        reported = span.start

        def report() -> None:
            nonlocal reported
            position = min(raw.tell(), span.stop)  # reading runs ahead, into the next span
            listener.advance(position - reported)
            reported = position

        with io.BufferedReader(_decompressed(raw, span.path), CHUNK) as stream:
            yield stream, report


def _decompressed(raw: io.FileIO, path: str) -> Any:
    compression = COMPRESSION.get(os.path.splitext(path)[1])
    if compression is None:
        return raw
    import pyarrow as pa

    return pa.CompressedInputStream(raw, compression)


def _decoded(chunks: Iterable[bytes], encoding: str = "utf-8") -> Iterator[str]:
    """Text of UTF-8 that arrives in pieces; bytes that are none become lone surrogates."""
    decoder = codecs.getincrementaldecoder(encoding)("surrogateescape")
    for chunk in chunks:
        yield decoder.decode(chunk)
    yield decoder.decode(b"", final=True)


def _mended(chunks: Iterable[str], where: Place, listener: Listener) -> Iterator[str]:
    """The same text with every lone surrogate replaced, the first one reported."""
    clean = True
    for chunk in chunks:
        if clean and not chunk.isascii() and _SURROGATE.search(chunk):
            listener.problem("undecodable", where)
            clean = False
        yield chunk if clean else _SURROGATE.sub("\ufffd", chunk)


def _text(span: Span, listener: Listener) -> Iterator[str]:
    line = 1

    def chunks() -> Iterator[str]:
        nonlocal line
        with _open(span, listener) as (stream, report):
            for text in _decoded(iter(partial(stream.read, CHUNK), b""), "utf-8-sig"):
                report()
                bad = _SURROGATE.search(text)
                line += text.count("\n", 0, bad.start() if bad else None)
                yield text

    return _mended(chunks(), lambda: f"{span.path}:{line}", listener)


def _json_lines(span: Span, text_field: str, listener: Listener) -> Iterator[tuple[Place, Iterator[str]]]:
    for where, line in _lines(span, listener):
        if isinstance(line, mmap.mmap):
            yield where, _mended(string_chunks(line, text_field, where()), where, listener)
        else:
            yield where, _mended([_text_of(line, text_field, where)], where, listener)


def rows(span: Span, wanted: str, listener: Listener) -> Iterator[tuple[Place, dict[str, Any]]]:
    """Each line's JSON object, with its place; ``wanted`` says in errors what it should have.

    Raises:
        ValueError: ``FILE:LINE: …`` for a line that is no JSON object; ``FILE: …`` for a damaged file.
    """
    try:
        for where, line in _lines(span, listener):
            yield where, _row_of(line[:], wanted, where)
    except OSError as error:
        if error.errno is None:  # pyarrow's, about the content
            raise ValueError(f"{span.path}: damaged ({error})") from error
        raise


def mended(text: str, where: Place, listener: Listener) -> str:
    """Text of a row, with what is no UTF-8 replaced and reported."""
    return next(_mended([text], where, listener))


def _lines(span: Span, listener: Listener) -> Iterator[tuple[Place, bytes | mmap.mmap]]:
    """The lines that are not blank; very long ones as memory maps, each closed before the next line."""
    with _open(span, listener) as (stream, report):
        compressed = span.path.endswith(tuple(COMPRESSION))
        position = span.start + _skip_begun_line(stream, span)
        number = 1 if position > span.start else 0  # lines begun in or before the span's first byte

        def where() -> str:
            return f"{span.path}:{_count_lines(span.path, span.start) + number}"

        while compressed or position < span.stop:
            line = stream.readline(LONG_LINE)
            if not line:
                return
            number += 1
            if len(line) == LONG_LINE and not line.endswith(b"\n"):
                with _mapped(line, stream) as mapped:
                    position += len(mapped)
                    yield where, mapped
            else:
                position += len(line)
                if not line.isspace():
                    yield where, line
            report()


def _skip_begun_line(stream: io.BufferedReader, span: Span) -> int:
    """Bytes up to the first line that begins in the span (or up to the span's end)."""
    if span.start == 0:
        return 0
    with open(span.path, "rb") as before:
        before.seek(span.start - 1)
        if before.read(1) == b"\n":
            return 0
    skipped = 0
    while span.start + skipped < span.stop:
        line = stream.readline(CHUNK)
        skipped += len(line)
        if not line or line.endswith(b"\n"):
            break
    return skipped


@lru_cache(maxsize=8)
def _count_lines(path: str, stop: int) -> int:
    """Lines that end within the first ``stop`` bytes; read only to name a line in a message."""
    lines = 0
    with open(path, "rb") as file:
        while stop > 0 and (data := file.read(min(CHUNK, stop))):
            lines += data.count(b"\n")
            stop -= len(data)
    return lines


def _row_of(line: bytes, wanted: str, where: Place) -> dict[str, Any]:
    try:
        row = json.loads(line.decode("utf-8", "surrogateescape").removeprefix("\ufeff"))
    except (ValueError, RecursionError) as error:
        raise ValueError(f"{where()}: not valid JSON ({error})") from error
    if not isinstance(row, dict):
        raise ValueError(f"{where()}: expected a JSON object with {wanted}, not {line[:20]!r}…")
    return row


def _text_of(line: bytes, text_field: str, where: Place) -> str:
    row = _row_of(line, f"a field {text_field!r}", where)
    if text_field not in row:
        names = ", ".join(map(repr, list(row)[:8])) or "none"
        raise ValueError(f"{where()}: no field {text_field!r}; it has {names} (choose with --text-field)")
    text = row[text_field]
    if text is None:
        return ""
    if not isinstance(text, str):
        raise ValueError(f"{where()}: field {text_field!r} holds {type(text).__name__}; it must hold text")
    return text


@contextmanager
def _mapped(head: bytes, stream: io.BufferedReader) -> Iterator[mmap.mmap]:
    """The line that begins with ``head``, to its end, in a temporary file instead of in memory."""
    with tempfile.TemporaryFile() as file:
        while head:
            file.write(head)
            if head.endswith(b"\n"):
                break
            head = stream.readline(CHUNK)
        file.flush()
        with mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) as mapped:
            yield mapped


def _parquet_rows(span: Span, text_field: str, listener: Listener) -> Iterator[tuple[Place, Iterator[str]]]:
    import pyarrow as pa

    file = open_parquet(span.path)
    rows = [file.metadata.row_group(group).num_rows for group in range(span.stop)]
    number, last = sum(rows[: span.start]), sum(rows)
    todo, groups = max(1, last - number), range(span.start, span.stop)
    for batch in file.iter_batches(64, row_groups=groups, columns=[text_field], use_threads=False):
        for value in batch.column(0).cast(pa.large_binary()):
            number += 1
            data = memoryview(value.as_buffer()) if value.is_valid else b""
            pieces = (bytes(data[at : at + CHUNK]) for at in range(0, len(data), CHUNK))
            where = partial("{}:{}".format, span.path, number)
            yield where, _mended(_decoded(pieces), where, listener)
        listener.advance(span.size * batch.num_rows // todo)
