"""An Arrow batch of documents with its texts split once, for all steps that look at words or lines.

Words are what stands between blanks, as in Gopher's rules; terms are runs of letters, digits and underscores
in lower case, for comparing texts. Each is held as numbers of a vocabulary, so that what is asked of a word
is asked once for each different word.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from itertools import chain
from typing import Any, TypeVar

import numpy as np
import xxhash
from numpy.typing import NDArray

__all__ = ["Batch", "Tokens", "hash_text"]

_T = TypeVar("_T")
_TERM = re.compile(r"\w+")


def hash_text(text: str) -> int:
    """XXH3-64 of UTF-8."""
    return xxhash.xxh3_64_intdigest(text.encode("utf-8", "surrogatepass"))


@dataclass(frozen=True)
class Tokens:
    """Words or terms of a batch's texts, one text after another."""

    vocabulary: Sequence[str]
    """The different ones, [vocabulary]."""
    ids: NDArray[np.int32]
    """Each one's number in the vocabulary, [tokens]."""
    bounds: NDArray[np.int64]
    """Where each text's begin, and the end of the last, [texts + 1]."""

    @classmethod
    def of(cls, texts: Iterable[list[str]]) -> Tokens:
        lists = list(texts)
        vocabulary = {word: number for number, word in enumerate(dict.fromkeys(chain.from_iterable(lists)))}
        bounds = np.zeros(len(lists) + 1, np.int64)
        np.cumsum([len(words) for words in lists], out=bounds[1:])
        found = map(vocabulary.__getitem__, chain.from_iterable(lists))
        return cls(list(vocabulary), np.fromiter(found, np.int32, int(bounds[-1])), bounds)

    @classmethod
    def of_terms(cls, texts: Iterable[str]) -> Tokens:
        """Runs of letters, digits and underscores, in lower case."""
        return cls.of(_TERM.findall(text.lower()) for text in texts)

    @property
    def counts(self) -> NDArray[np.int64]:
        """Tokens of each text, [texts]."""
        return np.diff(self.bounds)

    @cached_property
    def owners(self) -> NDArray[np.int64]:
        """The text that each token is of, [tokens]."""
        return np.repeat(np.arange(len(self.counts)), self.counts)

    @cached_property
    def hashes(self) -> NDArray[np.uint64]:
        """XXH3-64 of each token, [tokens]; the same in any batch."""
        return self.each(hash_text, np.uint64)

    @cached_property
    def lengths(self) -> NDArray[np.int64]:
        """Characters of each token, [tokens]."""
        return self.each(len, np.int64)

    def each(self, function: Callable[[str], Any], dtype: Any) -> NDArray[Any]:
        """What a function gives for each token, [tokens]."""
        return np.fromiter(map(function, self.vocabulary), dtype, len(self.vocabulary))[self.ids]

    def sums(self, values: NDArray[Any]) -> NDArray[np.int64]:
        """Sums of a value of each token, [tokens], over each text, [texts]."""
        total = np.zeros(len(values) + 1, np.int64)
        np.cumsum(values, out=total[1:])
        sums: NDArray[np.int64] = total[self.bounds[1:]] - total[self.bounds[:-1]]
        return sums

    def ngrams(self, n: int) -> tuple[NDArray[np.int64], NDArray[np.uint64]]:
        """Where an n-gram within a text begins, and its hash; the same in any batch."""
        count = len(self.ids) - n + 1
        if count <= 0:
            return np.empty(0, np.int64), np.empty(0, np.uint64)
        left = self.bounds[1:][self.owners[:count]] - np.arange(count)
        begins = np.flatnonzero(left >= n)
        return begins, self.hash_ngrams(begins, n)

    def hash_ngrams(self, begins: NDArray[np.int64], n: int) -> NDArray[np.uint64]:
        """Hashes of the n-grams that begin at these tokens."""
        hashes = self.hashes
        if len(begins) * 2 < len(hashes):
            mixed = hashes[begins]
            for offset in range(1, n):
                mixed = mixed * _FACTOR + hashes[begins + offset]
            return mixed
        count = len(hashes) - n + 1
        mixed = hashes[:count].copy()
        for offset in range(1, n):
            mixed *= _FACTOR
            mixed += hashes[offset : offset + count]
        return mixed if len(begins) == count else mixed[begins]


_FACTOR = np.uint64(0x9E3779B97F4A7C15)  # odd, of random bits: the golden ratio


class Batch:
    """Documents of one source: an Arrow batch with at least ``id`` and ``text``, and its texts' splits.

    Steps give a new batch, with columns added (``STEP.NAME``) or texts replaced; none is changed.
    """

    def __init__(self, table: Any, splits: dict[str, Any] | None = None) -> None:
        self.table = table
        self._splits: dict[str, Any] = {} if splits is None else splits

    def __len__(self) -> int:
        return int(self.table.num_rows)

    def column(self, name: str) -> Any:
        """An Arrow array."""
        return self.table.column(name)

    def numbers(self, name: str) -> NDArray[Any]:
        """A column of numbers, [documents]."""
        return np.asarray(self.table.column(name).to_numpy(zero_copy_only=False))

    def with_columns(self, columns: Mapping[str, Any]) -> Batch:
        """With columns added, by name: Arrow's arrays, NumPy's, or lists."""
        import pyarrow as pa

        table = self.table
        for name, values in columns.items():
            table = table.append_column(name, values if isinstance(values, pa.Array) else pa.array(values))
        return Batch(table, self._splits)

    def with_texts(self, texts: list[str]) -> Batch:
        """With other texts."""
        import pyarrow as pa

        if texts == self.texts:
            return self
        at = self.table.schema.get_field_index("text")
        return Batch(self.table.set_column(at, "text", pa.array(texts, pa.large_string())))

    def split(self, name: str, make: Callable[[], _T]) -> _T:
        """What ``make`` gives, made once for these texts."""
        if name not in self._splits:
            self._splits[name] = make()
        found: _T = self._splits[name]
        return found

    @property
    def texts(self) -> list[str]:
        """[documents]"""
        return self.split("texts", self.table.column("text").to_pylist)

    @property
    def words(self) -> Tokens:
        """What stands between blanks."""
        return self.split("words", lambda: Tokens.of(text.split() for text in self.texts))

    @property
    def terms(self) -> Tokens:
        """Runs of letters, digits and underscores, in lower case."""
        return self.split("terms", lambda: Tokens.of_terms(self.texts))

    @property
    def lines(self) -> list[list[str]]:
        """Each text's lines that are not blank, without blanks around them."""
        return self.split("lines", lambda: [_stripped(text.split("\n")) for text in self.texts])


def _stripped(lines: list[str]) -> list[str]:
    return [line for line in map(str.strip, lines) if line]
