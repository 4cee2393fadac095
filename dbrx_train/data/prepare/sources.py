"""Which files there are to read, and their fixed partition into parts of about equal work.

The partition depends on the files alone, never on the number of processes: that makes the output the
same whoever does the work, and lets finished parts be kept when a run is started again.
"""

from __future__ import annotations

import glob
import hashlib
import os
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Literal

from dbrx_train.data.prepare.content import COMPRESSION, holds_array
from dbrx_train.data.prepare.parquet import check_columns, open_parquet
from dbrx_train.data.prepare.text_template import TextTemplate
from dbrx_train.errors import seen_from

__all__ = ["Catalog", "Part", "Source", "Span", "find_files", "plan_parts"]

Kind = Literal["text", "jsonl", "json", "parquet"]

# Many parts even for a small corpus, so that every core has work; bounded for a large one, so that an
# interruption costs little. A part of 64 MiB of text gives one or two shards.
PARTS = 64
MIN_PART_BYTES = 1 << 20
MAX_PART_BYTES = 1 << 26


@dataclass(frozen=True)
class Span:
    """A run of one file: bytes [start, stop) of text or JSON, row groups [start, stop) of Parquet.

    A line belongs to the span in which its first byte lies. ``size`` is its share of the file's bytes.
    """

    path: str
    kind: Kind
    start: int
    stop: int
    size: int


Part = tuple[Span, ...]


@dataclass(frozen=True)
class Source:
    """What one argument of the user's came to: files and bytes found, and a digest of names, sizes, times."""

    given: str
    files: int
    bytes: int
    digest: str


@dataclass(frozen=True)
class Catalog:
    """Files (path, kind) in a fixed order, each once; ``duplicates`` were named more than once."""

    sources: tuple[Source, ...]
    files: tuple[tuple[str, Kind], ...]
    duplicates: tuple[str, ...]


def find_files(sources: Sequence[str], suffixes: Sequence[str]) -> Catalog:
    """Resolve files, folders (recursively, hidden names left out) and globs, in the order given.

    Args:
        sources: paths or glob patterns.
        suffixes: endings of plain-text files; JSON lines and Parquet are always known.

    Raises:
        ValueError: a source is missing, unreadable, matches nothing, or is a file of unknown type.
    """
    if not sources:
        raise ValueError("sources: none given; name at least one file, folder or glob")
    for suffix in suffixes:
        if not suffix.startswith("."):
            raise ValueError(f"--suffix: {suffix!r} must begin with a dot, as '.txt' does")
    seen: set[str] = set()
    files: list[tuple[str, Kind]] = []
    duplicates: list[str] = []
    found: list[Source] = []
    for given in map(os.fspath, sources):
        own: list[tuple[str, int, int]] = []
        for path, name in _resolve(given, suffixes):
            if (real := os.path.realpath(path)) in seen:
                duplicates.append(path)
                continue
            seen.add(real)
            status = os.stat(path)
            own.append((name, status.st_size, status.st_mtime_ns))
            kind = _kind(path, suffixes)
            assert kind is not None
            files.append((path, kind))
        digest = hashlib.sha256(repr(own).encode("utf-8", "surrogateescape")).hexdigest()
        found.append(Source(given, len(own), sum(size for _, size, _ in own), digest))
    return Catalog(tuple(found), tuple(files), tuple(duplicates))


def _resolve(given: str, suffixes: Sequence[str]) -> Iterator[tuple[str, str]]:
    """(path, name within the source) of each readable file."""
    path = os.path.expanduser(given)
    endings = [*suffixes, ".jsonl", ".json (.gz, .zst)"]
    known = f"{', '.join(endings)} or .parquet"
    if os.path.isfile(path):
        if _kind(path, suffixes) is None:
            more = " (more with --suffix)" if suffixes else ""
            raise ValueError(f"{given}: of no known type; it must end in {known}{more}")
        yield path, os.path.basename(path)
        return
    if os.path.isdir(path):
        matches = list(_walk(path, suffixes))
    elif os.path.lexists(path) or not glob.has_magic(path):
        raise ValueError(f"{given}: no such file or folder{seen_from(path)}")
    else:
        matches = []
        for hit in sorted(glob.glob(path, recursive=True)):
            named = _kind(path, ()) == "json"
            matches += _walk(hit, suffixes) if os.path.isdir(hit) else _if_known(hit, suffixes, named)
    if not matches:
        hint = "; .json is read where it is named, as by FOLDER/*.json"
        raise ValueError(
            f"{given}: nothing in it to read{seen_from(path)}; looked for files ending in {known}{hint}"
        )
    for match in matches:
        yield match, os.path.relpath(match, path) if os.path.isdir(path) else match


def _walk(folder: str, suffixes: Sequence[str]) -> Iterator[str]:
    for root, folders, names in os.walk(folder, onerror=_refuse):
        folders[:] = sorted(name for name in folders if not name.startswith("."))
        for name in sorted(names):
            if not name.startswith("."):
                yield from _if_known(os.path.join(root, name), suffixes)


def _refuse(error: OSError) -> None:
    raise error


def _if_known(path: str, suffixes: Sequence[str], named: bool = False) -> list[str]:
    kind = _kind(path, suffixes)
    # Folders of data hold .json files about the data
    return [path] if kind and (named or kind != "json") and os.path.isfile(path) else []


def _kind(path: str, suffixes: Sequence[str]) -> Kind | None:
    stem, ending = os.path.splitext(path)
    content = stem if ending in COMPRESSION else path
    if path.endswith(".parquet"):
        return "parquet"
    if content.endswith(".jsonl"):
        return "jsonl"
    if path.endswith(tuple(suffixes)) or content.endswith(tuple(suffixes)):
        return "text"
    return "json" if content.endswith(".json") else None


def plan_parts(catalog: Catalog, template: TextTemplate | None) -> list[Part]:
    """Cut large JSON lines and Parquet files, group small files, into parts of about equal bytes.

    Raises:
        ValueError: a Parquet file is damaged or has no such text column as ``template`` asks for.
    """
    total = sum(source.bytes for source in catalog.sources)
    target = min(MAX_PART_BYTES, max(MIN_PART_BYTES, total // PARTS))
    parts: list[Part] = []
    held: list[Span] = []
    size = 0
    for path, kind in catalog.files:
        for span in _spans(path, kind, target, template):
            if held and size + span.size > target:
                parts.append(tuple(held))
                held, size = [], 0
            held.append(span)
            size += span.size
    return [*parts, tuple(held)] if held else parts


def _spans(path: str, kind: Kind, target: int, template: TextTemplate | None) -> Iterator[Span]:
    size = os.path.getsize(path)
    if kind == "json" and not holds_array(path):
        kind = "jsonl"
    if kind == "parquet":
        yield from _parquet_spans(path, target, template)
    elif kind == "jsonl" and not path.endswith(tuple(COMPRESSION)):
        for start in range(0, size, target):
            stop = min(start + target, size)
            yield Span(path, kind, start, stop, stop - start)
    else:
        yield Span(path, kind, 0, size, size)


def _parquet_spans(path: str, target: int, template: TextTemplate | None) -> Iterator[Span]:
    file = open_parquet(path)
    if template is not None:
        check_columns(path, file.schema_arrow, template)
    start, size = 0, 0
    for group in range(file.num_row_groups):
        size += file.metadata.row_group(group).total_byte_size
        if size >= target or group == file.num_row_groups - 1:
            yield Span(path, "parquet", start, group + 1, size)
            start, size = group + 1, 0
