"""Records of a file: lines of JSON, or the elements of one JSON array."""

from __future__ import annotations

import io
import json
import mmap
import tempfile
from collections.abc import Callable, Collection, Iterable, Iterator
from contextlib import contextmanager
from typing import Any, Protocol

from dbrx_train.data.origins import Origin
from dbrx_train.data.prepare.content import BUFFER, COMPRESSION, open_content
from dbrx_train.data.prepare.long_lines import array_elements
from dbrx_train.data.prepare.parquet import open_parquet, row_batches
from dbrx_train.data.prepare.sources import Span

__all__ = ["Deaf", "Listener", "Place", "Record", "naming_damage", "open_span", "records", "row_of", "rows"]

LONG_LINE = 1 << 24
"""Bytes above which a record is read through a memory map."""

Record = bytes | memoryview
"""JSON of a record; a view of a memory map if it is very long."""


class Place(Protocol):
    """Gives a place for people, as an ``Origin`` does; a function, as counting lines up to it takes time."""

    def __call__(self) -> str:
        """``FILE``, ``FILE:LINE`` or ``FILE[INDEX]``."""


class Listener(Protocol):
    """Hears what a reader comes across."""

    def problem(self, kind: str, where: Place) -> None:
        """``kind`` of trouble met, and mended, at ``where``."""

    def advance(self, size: int) -> None:
        """``size`` more bytes of the file have been read."""


class Deaf:
    """A listener that does nothing."""

    def problem(self, kind: str, where: Place) -> None:
        pass

    def advance(self, size: int) -> None:
        pass


@contextmanager
def naming_damage(path: str) -> Iterator[None]:
    """What pyarrow says of a file's content is a ValueError that names it."""
    try:
        yield
    except OSError as error:
        if error.errno is None:
            raise ValueError(f"{path}: damaged ({error})") from error
        raise


@contextmanager
def open_span(span: Span, listener: Listener) -> Iterator[tuple[io.BufferedReader, Callable[[], None]]]:
    """The span's file, decompressed, at ``span.start``, and a function that reports how far it was read."""
    with open_content(span.path, span.start) as (stream, tell):
        reported = span.start

        def report() -> None:
            nonlocal reported
            position = min(tell(), span.stop)  # reading runs ahead, into the next span
            listener.advance(position - reported)
            reported = position

        yield stream, report


def rows(
    span: Span, wanted: str, names: Collection[str], listener: Listener
) -> Iterator[tuple[Origin, dict[str, Any]]]:
    """Each record's object, or row of Parquet, with its place.

    Args:
        span: what to read.
        wanted: what a record should have, for errors.
        names: the columns of Parquet that matter.
        listener: told how far it is.

    Raises:
        ValueError: ``FILE:LINE: …`` for a record that is no JSON object; ``FILE: …`` for a damaged file.
    """
    with naming_damage(span.path):
        if span.kind == "parquet":
            yield from _parquet_rows(span, wanted, names, listener)
        else:
            for where, record in records(span, listener):
                yield where, row_of(record, wanted, where)


def _parquet_rows(
    span: Span, wanted: str, names: Collection[str], listener: Listener
) -> Iterator[tuple[Origin, dict[str, Any]]]:
    file = open_parquet(span.path)
    columns = [name for name in file.schema_arrow.names if name in names]
    if not columns:
        held = ", ".join(file.schema_arrow.names)
        raise ValueError(
            f"{span.path}: none of its columns is of a conversation; must have {wanted}, has {held}"
        )
    for before, batch in row_batches(file, span.start, span.stop, columns):
        for number, row in enumerate(batch.to_pylist(), start=before + 1):
            yield Origin(span.path, "parquet", 0, number), row
        listener.advance(0)  # to be stopped
    listener.advance(span.size)


def row_of(record: Record, wanted: str, where: Place) -> dict[str, Any]:
    """The record's JSON object."""
    text = bytes(record).decode("utf-8", "surrogateescape").removeprefix("\ufeff")
    try:
        row = json.loads(text)
    except (ValueError, RecursionError) as error:
        if not text.isascii() and "\udc80" <= max(text) <= "\udfff":
            raise ValueError(f"{where()}: neither JSON nor UTF-8 ({error}); convert it to UTF-8") from error
        if text.strip() == "{":
            raise ValueError(
                f"{where()}: an object over several lines; it must be one line, or in an array"
            ) from None
        raise ValueError(f"{where()}: not valid JSON ({error})") from error
    if not isinstance(row, dict):
        raise ValueError(f"{where()}: expected a JSON object with {wanted}, not {bytes(record[:20])!r}…")
    return row


def records(span: Span, listener: Listener) -> Iterator[tuple[Origin, Record]]:
    """The span's records, to be used one after another."""
    return _elements(span, listener) if span.kind == "json" else _lines(span, listener)


def _elements(span: Span, listener: Listener) -> Iterator[tuple[Origin, Record]]:
    """The elements of the array that the file is; what is compressed is unpacked into a temporary file."""
    reported = 0
    with _mapped_content(span.path, listener) as data:
        for number, (start, stop) in enumerate(array_elements(data, span.path)):
            where = Origin(span.path, "json", 0, number)
            if stop - start < LONG_LINE:
                yield where, data[start:stop]
            else:
                with memoryview(data) as whole, whole[start:stop] as part:
                    yield where, part
            so_far = span.size * stop // len(data)
            listener.advance(so_far - reported)
            reported = so_far


@contextmanager
def _mapped_content(path: str, listener: Listener) -> Iterator[mmap.mmap]:
    with open_content(path) as (stream, _):
        if path.endswith(tuple(COMPRESSION)):

            def chunks() -> Iterator[bytes]:
                while data := stream.read(BUFFER):
                    listener.advance(0)  # to be stopped
                    yield data

            with _spooled(chunks()) as data:
                yield data
        else:
            with mmap.mmap(stream.fileno(), 0, access=mmap.ACCESS_READ) as data:
                yield data


def _lines(span: Span, listener: Listener) -> Iterator[tuple[Origin, Record]]:
    """The lines that are not blank; very long ones as memory maps, each closed before the next line."""
    with open_span(span, listener) as (stream, report):
        compressed = span.path.endswith(tuple(COMPRESSION))
        position = span.start + _skip_begun_line(stream, span)
        number = 1 if position > span.start else 0  # lines begun in or before the span's first byte
        while compressed or position < span.stop:
            line = stream.readline(LONG_LINE)
            if not line:
                return
            number += 1
            where = Origin(span.path, "jsonl", span.start, number)
            if len(line) == LONG_LINE and not line.endswith(b"\n"):
                with _spooled(_rest_of_line(line, stream)) as data:
                    position += len(data)
                    with memoryview(data) as view:
                        yield where, view
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
        line = stream.readline(BUFFER)
        skipped += len(line)
        if not line or line.endswith(b"\n"):
            break
    return skipped


def _rest_of_line(head: bytes, stream: io.BufferedReader) -> Iterator[bytes]:
    while head:
        yield head
        if head.endswith(b"\n"):
            return
        head = stream.readline(BUFFER)


@contextmanager
def _spooled(chunks: Iterable[bytes]) -> Iterator[mmap.mmap]:
    """The bytes in a temporary file instead of in memory."""
    with tempfile.TemporaryFile() as file:
        file.writelines(chunks)
        file.flush()
        with mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) as data:
            yield data
