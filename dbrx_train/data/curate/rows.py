"""Documents of a span with their ids and the fields to keep, as batches of a few megabytes."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from typing import Any

from dbrx_train.data.curate.recipe import Source
from dbrx_train.data.origins import Origin
from dbrx_train.data.prepare.documents import documents, mended, text_of
from dbrx_train.data.prepare.parquet import open_parquet, row_batches
from dbrx_train.data.prepare.records import Listener, naming_damage, records, row_of
from dbrx_train.data.prepare.sources import Span
from dbrx_train.data.prepare.text_template import value_of

__all__ = ["batches"]

LONGEST = 1 << 24
"""Bytes of JSON, or characters of text, above which a document is left out: steps see documents whole."""
_BATCH_CHARACTERS = 1 << 22
_BATCH_ROWS = 4096

Row = tuple[str, str, list[str | None]]


def batches(spans: Iterable[Span], source: Source, listener: Listener) -> Iterator[Any]:
    """Arrow batches with ``id``, ``text`` and ``metadata.FIELD``.

    Documents that are too long are left out, and reported.

    Raises:
        ValueError: ``FILE:LINE: …`` for a row without the text, the id or a field to keep.
    """
    held, size = list[Row](), 0
    for span in spans:
        for row in _rows(span, source, listener):
            held.append(row)
            size += len(row[1])
            if size >= _BATCH_CHARACTERS or len(held) == _BATCH_ROWS:
                yield _table(held, source)
                held, size = [], 0
    if held:
        yield _table(held, source)


def _table(rows: list[Row], source: Source) -> Any:
    import pyarrow as pa

    ids, texts, kept = zip(*rows, strict=True)
    columns = {"id": pa.array(ids, pa.string()), "text": pa.array(texts, pa.large_string())}
    for field, values in zip(source.keep, zip(*kept, strict=True), strict=True):
        columns[f"metadata.{field}"] = pa.array(values, pa.string())
    return pa.RecordBatch.from_pydict(columns)


def _rows(span: Span, source: Source, listener: Listener) -> Iterator[Row]:
    template = source.text
    with naming_damage(span.path):
        if span.kind == "text":
            for where, chunks in documents(span, template, listener):
                if (text := _joined(chunks)) is None:
                    listener.problem("too long, left out", where)
                else:
                    yield _place(where), text, [None] * len(source.keep)
            return
        for where, row in _values(span, source, listener):
            text = mended(text_of(row, template, where, listener), where, listener)
            kept = [_field(row, field, where, "keep") for field in source.keep]
            name = None if source.id_field is None else _field(row, source.id_field, where, "id_field")
            yield _place(where) if name is None else name, text, kept


def _values(span: Span, source: Source, listener: Listener) -> Iterator[tuple[Origin, dict[str, Any]]]:
    if span.kind != "parquet":
        for where, record in records(span, listener):
            if len(record) > LONGEST:
                listener.problem("too long, left out", where)
            else:
                yield where, row_of(record, f"a field {source.text.fields[0]!r}", where)
        return
    file = open_parquet(span.path)
    names = set(file.schema_arrow.names)
    wanted = [*source.text.fields, *source.keep, *([source.id_field] if source.id_field else [])]
    columns = list(dict.fromkeys(name if name in names else name.split(".")[0] for name in wanted))
    for column in columns:
        if column not in names:
            raise ValueError(f"{span.path}: no column {column!r}; it has {', '.join(sorted(names))}")
    for before, batch in row_batches(file, span.start, span.stop, columns):
        for number, row in enumerate(batch.to_pylist(), start=before + 1):
            yield Origin(span.path, "parquet", 0, number), _decoded(row)
        listener.advance(0)  # to be stopped
    listener.advance(span.size)


def _joined(chunks: Iterator[str]) -> str | None:
    """All of a text; None if it is too long."""
    held, size = list[str](), 0
    for chunk in chunks:
        size += len(chunk)
        if size > LONGEST:
            return None
        held.append(chunk)
    return "".join(held)


def _place(where: Origin) -> str:
    """An id that takes no counting of lines: those from the middle of a file are counted from a byte on."""
    if where.kind in ("jsonl", "parquet"):
        return _clean(f"{where.path}{f'@{where.start}' if where.start else ''}:{where.number}")
    return _clean(where())


def _field(row: dict[str, Any], field: str, where: Origin, option: str) -> str | None:
    try:
        value = value_of(row, field)
    except KeyError:
        held = ", ".join(map(repr, list(row)[:8])) or "none"
        raise ValueError(f"{where()}: no field {field!r} ({option}); it has {held}") from None
    return None if value is None else _clean(str(value))


def _decoded(value: Any) -> Any:
    """Bytes in a row as the text that they are."""
    if isinstance(value, dict):
        return {name: _decoded(inner) for name, inner in value.items()}
    return value.decode("utf-8", "surrogateescape") if isinstance(value, bytes) else value


def _clean(text: str) -> str:
    return text if text.isascii() else text.encode("utf-8", "replace").decode()
