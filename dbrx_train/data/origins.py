"""Which documents shards are made of: ``documents.npz`` beside the shards of each folder.

The samples of a folder, one after another, are a row of tokens. The file says at which token of it each
document begins, and where that document was read.
"""

from __future__ import annotations

import json
from array import array
from functools import lru_cache
from pathlib import Path
from typing import NamedTuple
from zipfile import BadZipFile

import numpy as np

__all__ = ["Origin", "OriginLog", "read_origins"]

DOCUMENTS = "documents.npz"
_BLOCK = 1 << 20


class Origin(NamedTuple):
    """Where a document was read; called, it gives ``FILE``, ``FILE:LINE``, or ``FILE[INDEX]`` of an array."""

    path: str
    kind: str
    """That of the span that it was read from: text, jsonl, json or parquet."""
    start: int = 0
    """Of a line: the byte from which lines were counted."""
    number: int = 0
    """Of a line: how many lines after ``start``; else the number of the element or the row."""

    def __call__(self) -> str:
        """The place, for people; counting lines up to it takes time."""
        if self.kind == "text":
            return self.path
        if self.kind == "json":
            return f"{self.path}[{self.number}]"
        return f"{self.path}:{_count_lines(self.path, self.start) + self.number}"


class OriginLog:
    """Collects where documents begin and were read, in the order of their tokens."""

    def __init__(self) -> None:
        self._tokens, self._numbers, self._spans = array("Q"), array("Q"), array("L")
        self._table: dict[tuple[str, str, int], int] = {}

    def add(self, token: int, origin: Origin) -> None:
        """A document from there begins at this token."""
        self._tokens.append(token)
        self._spans.append(self._table.setdefault(origin[:3], len(self._table)))
        self._numbers.append(origin.number)

    def since(self, token: int) -> list[tuple[int, Origin]]:
        """The documents of the tokens from ``token`` on, each with where it begins, counted from there."""
        spans, found = list(self._table), []
        for i in reversed(range(len(self._tokens))):
            found.append((max(0, self._tokens[i] - token), Origin(*spans[self._spans[i]], self._numbers[i])))
            if self._tokens[i] <= token:
                break
        return found[::-1]

    def write(self, folder: Path, tokens: int) -> None:
        """Write those of the first ``tokens`` tokens beside the shards that hold these."""
        begins = np.array(self._tokens, np.uint64)
        count = int(np.searchsorted(begins, tokens))
        np.savez_compressed(
            folder / DOCUMENTS,
            tokens=np.diff(begins[:count], prepend=np.uint64(0)),  # small numbers pack well
            spans=np.array(self._spans[:count], np.uint32),
            numbers=np.array(self._numbers[:count], np.uint64),
            table=np.frombuffer(json.dumps(list(self._table)).encode(), np.uint8),
        )


def read_origins(folder: Path, begin: int, end: int) -> list[tuple[int, Origin]] | None:
    """The documents of a folder's tokens [begin, end), each with its first one there, counted from ``begin``.

    None where that was not written down. Raises ValueError when the file is damaged.
    """
    path = folder / DOCUMENTS
    try:
        with np.load(path) as file:
            begins = np.cumsum(file["tokens"], dtype=np.uint64)
            table = json.loads(file["table"].tobytes())
            first = max(0, int(np.searchsorted(begins, begin, "right")) - 1)
            last = int(np.searchsorted(begins, end))
            rows = zip(*(file[name][first:last].tolist() for name in ("spans", "numbers")), strict=True)
            starts = begins[first:last].tolist()
            return [
                (max(0, token - begin), Origin(*[*table[span], number]))
                for token, (span, number) in zip(starts, rows, strict=True)
            ]
    except FileNotFoundError:
        return None
    except (BadZipFile, OSError, EOFError, ValueError, TypeError, LookupError) as error:
        raise ValueError(f"{path}: damaged ({error}); prepare the data again") from error


@lru_cache(maxsize=8)
def _count_lines(path: str, stop: int) -> int:
    """Lines that end within the first ``stop`` bytes; read only to name a line."""
    lines = 0
    if stop:
        with open(path, "rb") as file:
            while stop > 0 and (data := file.read(min(_BLOCK, stop))):
                lines += data.count(b"\n")
                stop -= len(data)
    return lines
