"""Rows of a Parquet file, and its columns of text."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

from dbrx_train.data.prepare.text_template import TextTemplate

__all__ = ["check_columns", "open_parquet", "row_batches", "text_batches"]

_BATCH = 64


def open_parquet(path: str) -> Any:
    """``pyarrow.parquet.ParquetFile``; ValueError when the file is damaged or is none."""
    import pyarrow as pa
    import pyarrow.parquet as pq

    try:
        return pq.ParquetFile(path)
    except pa.ArrowInvalid as error:
        raise ValueError(f"{path}: not a readable Parquet file ({str(error).splitlines()[0]})") from error


def check_columns(path: str, schema: Any, template: TextTemplate) -> None:
    """Raise ValueError if a field of the template is no column, or one that does not hold text.

    Text is strings or UTF-8 as bytes, with offsets of any width, also with a dictionary.
    """
    import pyarrow as pa

    for field in template.fields:
        found: Any = pa.struct(schema)
        for name in _names(schema, field):
            if not pa.types.is_struct(found) or found.get_field_index(name) < 0:
                names = ", ".join(schema.names)
                raise ValueError(
                    f"{path}: no column {field!r}; it has {names} (choose with {template.option})"
                )
            found = found.field(name).type
        held = found.value_type if pa.types.is_dictionary(found) else found
        kinds = (
            pa.string(),
            pa.large_string(),
            pa.string_view(),
            pa.binary(),
            pa.large_binary(),
            pa.binary_view(),
        )
        if held not in kinds:
            raise ValueError(f"{path}: column {field!r} holds {found}; it must hold strings")


def row_batches(file: Any, start: int, stop: int, columns: Sequence[str]) -> Iterator[tuple[int, Any]]:
    """Of row groups [start, stop), some rows at a time, and how many rows of the file are before them."""
    before = sum(file.metadata.row_group(group).num_rows for group in range(start))
    groups = range(start, stop)
    for batch in file.iter_batches(_BATCH, row_groups=groups, columns=list(columns), use_threads=False):
        yield before, batch
        before += batch.num_rows


def text_batches(file: Any, start: int, stop: int, template: TextTemplate) -> Iterator[tuple[int, list[Any]]]:
    """The same with the template's fields alone, as Arrow arrays of bytes."""
    import pyarrow as pa
    from pyarrow.compute import struct_field

    for before, batch in row_batches(file, start, stop, list(dict.fromkeys(template.fields))):
        arrays = []
        for field in template.fields:
            first, *inner = _names(file.schema_arrow, field)
            array = batch.column(first)
            for name in inner:
                array = struct_field(array, name)
            if pa.types.is_dictionary(array.type):
                array = array.dictionary_decode()
            arrays.append(array.cast(pa.large_binary()))
        yield before, arrays


def _names(schema: Any, field: str) -> list[str]:
    """The column, and the fields inside it, that ``field`` is."""
    return [field] if field in schema.names else field.split(".")
