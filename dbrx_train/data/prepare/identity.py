"""What a document is called where it was read: the fields of its row that name it."""

from __future__ import annotations

import itertools
import json
import os
from collections.abc import Iterator, Sequence
from typing import Any, cast

from dbrx_train.data.origins import Origin
from dbrx_train.data.prepare.parquet import open_parquet
from dbrx_train.data.prepare.records import Deaf, records
from dbrx_train.data.prepare.sources import Kind, Span

__all__ = ["names_of"]

_NAMES = ("id", "doc_id", "uuid", "url", "origin", "source", "metadata.id", "metadata.url", "metadata.origin")
_LONGEST = 120


def names_of(origins: Sequence[Origin]) -> dict[Origin, str]:
    """Of each document whose row has any, the fields that name it: ``id 17, url …``.

    Files that are gone, or are no longer what they were, are passed over.
    """
    found: dict[Origin, str] = {}
    key = Origin._fields.index("number")
    for begin, group in itertools.groupby(sorted(set(origins)), key=lambda origin: origin[:key]):
        wanted = {origin.number: origin for origin in group}
        try:
            for number, row in _rows(Origin(*begin), set(wanted)):
                if said := _said(row):
                    found[wanted[number]] = said
        except (OSError, ValueError):
            continue
    return found


def _rows(first: Origin, numbers: set[int]) -> Iterator[tuple[int, dict[str, Any]]]:
    """The rows of these numbers, of the file and the span that ``first`` is of."""
    if first.kind == "parquet":
        yield from _parquet_rows(first.path, numbers)
    elif first.kind != "text":
        span = Span(first.path, cast(Kind, first.kind), first.start, os.path.getsize(first.path), 0)
        for where, record in records(span, Deaf()):
            if where.number in numbers:
                row = json.loads(bytes(record))
                yield where.number, row if isinstance(row, dict) else {}
                if where.number == max(numbers):
                    return


def _parquet_rows(path: str, numbers: set[int]) -> Iterator[tuple[int, dict[str, Any]]]:
    file = open_parquet(path)
    columns = [name for name in file.schema_arrow.names if name in _NAMES]
    before = 0
    for group in range(file.num_row_groups if columns else 0):
        rows = file.metadata.row_group(group).num_rows
        inside = sorted(number for number in numbers if before < number <= before + rows)
        if inside:
            table = file.read_row_group(group, columns=columns)
            for number in inside:
                yield number, table.slice(number - before - 1, 1).to_pylist()[0]
        before += rows


def _said(row: dict[str, Any]) -> str:
    named = ((name, row.get(name)) for name in _NAMES)
    return ", ".join(
        f"{name} {str(value)[:_LONGEST]}"
        for name, value in named
        if isinstance(value, str | int) and value != ""
    )
