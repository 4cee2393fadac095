"""From a span of a file to its documents, each a stream of bounded pieces of text."""

from __future__ import annotations

import codecs
import re
from collections.abc import Iterable, Iterator, Mapping
from functools import partial
from typing import Any

from dbrx_train.data.origins import Origin
from dbrx_train.data.prepare.content import BUFFER
from dbrx_train.data.prepare.long_lines import string_chunks
from dbrx_train.data.prepare.parquet import open_parquet, text_batches
from dbrx_train.data.prepare.records import Listener, Place, naming_damage, open_span, records, row_of
from dbrx_train.data.prepare.sources import Span
from dbrx_train.data.prepare.text_template import TextTemplate, value_of
from dbrx_train.data.prepare.unread import OF_DOCUMENT, unread

__all__ = ["cut", "documents", "mended", "text_of"]

_SURROGATE = re.compile("[\ud800-\udfff]")
# Between these characters cl100k_base's pattern splits whatever stands around them: after a line break
# that is followed by no blank, and before a single space within text.
_SAFE_CUT = re.compile(r"\n(?=\S)|(?<=\S)(?= \S)")
_CUT_WINDOW = 1 << 16


def documents(
    span: Span, template: TextTemplate, listener: Listener
) -> Iterator[tuple[Origin, Iterator[str]]]:
    """Each document of the span: its place, and its text in pieces, to be taken before the next document.

    A text file is one document, and so is a line of JSON, an element of a JSON array and a row of Parquet;
    null text is an empty document. Text is UTF-8 (a byte order mark is dropped); bytes that are none become
    U+FFFD and are reported as ``undecodable``; fields that mean something and are not read are reported by
    name. Line ends are kept as they are.

    Raises:
        ValueError: ``FILE:LINE: …`` for a line that is no JSON object with such text fields; ``FILE: …``
            for a damaged file, or one that is not UTF-8.
    """
    with naming_damage(span.path):
        if span.kind == "text":
            yield Origin(span.path, "text"), _text(span, listener)
        elif span.kind == "parquet":
            yield from _parquet_rows(span, template, listener)
        else:
            yield from _json_records(span, template, listener)


def cut(chunks: Iterable[str], size: int = BUFFER) -> Iterator[str]:
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
        with naming_damage(span.path), open_span(span, listener) as (stream, report):
            for text in _decoded(iter(partial(stream.read, BUFFER), b""), "utf-8-sig"):
                report()
                bad = _SURROGATE.search(text)
                line += text.count("\n", 0, bad.start() if bad else None)
                yield text

    return _mended(chunks(), lambda: f"{span.path}:{line}", listener)


def _json_records(
    span: Span, template: TextTemplate, listener: Listener
) -> Iterator[tuple[Origin, Iterator[str]]]:
    for where, record in records(span, listener):
        if isinstance(record, memoryview):
            place, option = where(), template.option
            texts = [string_chunks(record, field, place, option) for field in template.fields]
            yield where, _mended(template.chunks(texts), where, listener)
        else:
            row = row_of(record, f"a field {template.fields[0]!r}", where)
            yield where, _mended([text_of(row, template, where, listener)], where, listener)


def mended(text: str, where: Place, listener: Listener) -> str:
    """Text of a row, with what is no UTF-8 replaced and reported."""
    return next(_mended([text], where, listener))


def text_of(row: Mapping[str, Any], template: TextTemplate, where: Place, listener: Listener) -> str:
    """The text of a record's object; reports fields that are not read.

    Raises:
        ValueError: ``FILE:LINE: …`` for one without such text fields.
    """
    for name in unread(row, OF_DOCUMENT, template.fields):
        listener.problem(f"field {name!r} is not read", where)
    texts = []
    for field in template.fields:
        try:
            text = value_of(row, field)
        except KeyError:
            names = ", ".join(map(repr, list(row)[:8])) or "none"
            raise ValueError(
                f"{where()}: no field {field!r}; it has {names} (choose with {template.option})"
            ) from None
        if not isinstance(text, str | None):
            raise ValueError(f"{where()}: field {field!r} holds {type(text).__name__}; it must hold text")
        texts.append(text or "")
    return template.fill(texts)


def _parquet_rows(
    span: Span, template: TextTemplate, listener: Listener
) -> Iterator[tuple[Origin, Iterator[str]]]:
    file = open_parquet(span.path)
    todo = sum(file.metadata.row_group(group).num_rows for group in range(span.start, span.stop))
    if span.start == 0:
        for name in sorted(OF_DOCUMENT.intersection(file.schema_arrow.names).difference(template.fields)):
            listener.problem(f"field {name!r} is not read", lambda: span.path)
    for before, columns in text_batches(file, span.start, span.stop, template):
        for number, values in enumerate(zip(*columns, strict=True), start=before + 1):
            where = Origin(span.path, "parquet", 0, number)
            yield where, _mended(template.chunks([_cell_text(value) for value in values]), where, listener)
        listener.advance(span.size * len(columns[0]) // todo)


def _cell_text(value: Any) -> Iterator[str]:
    data = memoryview(value.as_buffer()) if value.is_valid else b""
    return _decoded(bytes(data[at : at + BUFFER]) for at in range(0, len(data), BUFFER))
