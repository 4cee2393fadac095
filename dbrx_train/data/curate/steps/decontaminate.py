"""Decontamination: documents that share a run of words with an evaluation's examples.

As GPT-3 did it (arXiv 2005.14165, appendix C), by 13-grams; examples too short to have one are matched whole.
"""

from __future__ import annotations

import glob
import json
import os
from collections.abc import Iterator
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from dbrx_train.data.curate.batch import Batch, Tokens
from dbrx_train.data.curate.step import Rule, Step, between
from dbrx_train.errors import seen_from
from dbrx_train.files import atomic_write
from dbrx_train.options import option

__all__ = ["Decontaminate"]

_INDEX = "decontaminate.npz"
_BITS = 24
_SHIFT = np.uint64(64 - _BITS)


@dataclass(kw_only=True)
class Decontaminate(Step):
    """Remove documents that hold text of evaluation files."""

    name = "decontaminate"
    against: list[str] = option("names JSON lines with examples: files, folders or globs.")
    ngram: int = option("Words in a row that must be the same.", 13, ge=5, le=50)
    min_words: int = option("An example shorter than that is not looked for.", 8, ge=3)
    max_matches: int = option("Such runs that a document may have.", 0, ge=0)

    def check(self) -> None:
        if self.min_words > self.ngram:
            raise ValueError(f"min_words: must be at most ngram ({self.ngram}), not {self.min_words}")

    def files(self) -> list[str]:
        found = list[str]()
        for given in self.against:
            path = os.path.expanduser(given)
            if os.path.isdir(path):
                path = os.path.join(glob.escape(path), "**", "*.jsonl")
            if not (matches := sorted(glob.glob(path, recursive=True))):
                raise ValueError(f"decontaminate.against: {given}: no JSON lines there{seen_from(given)}")
            found += [match for match in matches if os.path.isfile(match)]
        return list(dict.fromkeys(found))

    def build(self, work: Path) -> None:
        """Hashes of all examples' n-grams, and of short examples as a whole, with the file of each."""
        hashes: dict[int, list[NDArray[np.uint64]]] = {}
        owners: dict[int, list[NDArray[np.int32]]] = {}
        files = self.files()
        for number, file in enumerate(files):
            terms = Tokens.of_terms(_strings(file))
            for length, found in self._hashed(terms):
                hashes.setdefault(length, []).append(found)
                owners.setdefault(length, []).append(np.full(len(found), number, np.int32))
        if not hashes:
            raise ValueError(
                f"decontaminate.against: {files[0]}: no example of {self.min_words} words or more in "
                f"{'it' if len(files) == 1 else f'these {len(files)} files'}"
            )
        arrays: dict[str, Any] = {"tasks": np.array([Path(file).stem for file in files])}
        for length in sorted(hashes):
            unique, first = np.unique(np.concatenate(hashes[length]), return_index=True)
            arrays[f"hashes_{length}"], arrays[f"owners_{length}"] = (
                unique,
                np.concatenate(owners[length])[first],
            )
        with atomic_write(work / _INDEX) as partial:
            np.savez(partial, **arrays)

    def _hashed(self, terms: Tokens) -> Iterator[tuple[int, NDArray[np.uint64]]]:
        """Of each length, what is to be looked for."""
        begins, found = terms.ngrams(self.ngram)
        if len(begins):
            yield self.ngram, found
        for length in range(self.min_words, self.ngram):
            begins = terms.bounds[:-1][terms.counts == length]
            if len(begins):
                yield length, terms.hash_ngrams(begins, length)

    def annotate(self, batch: Batch, work: Path) -> Batch:
        file = work / _INDEX
        tasks, index = _load(str(file), file.stat().st_mtime_ns)
        matches = np.zeros(len(batch), np.int64)
        task, shared = [""] * len(batch), [""] * len(batch)
        terms = batch.terms
        for length, (hashes, owners, seen) in index.items():
            begins, found = terms.ngrams(length)
            maybe = np.flatnonzero(seen[found >> _SHIFT])
            begins, found = begins[maybe], found[maybe]
            at = np.minimum(np.searchsorted(hashes, found), len(hashes) - 1)
            hits = np.flatnonzero(hashes[at] == found)
            np.add.at(matches, terms.owners[begins[hits]], 1)
            for hit in hits[::-1].tolist():  # the first one stays
                row, begin = int(terms.owners[begins[hit]]), int(begins[hit])
                task[row] = str(tasks[owners[at[hit]]])
                shared[row] = " ".join(terms.vocabulary[i] for i in terms.ids[begin : begin + length])
        own = "decontaminate"
        return batch.with_columns({f"{own}.matches": matches, f"{own}.task": task, f"{own}.shared": shared})

    def rules(self) -> list[Rule]:
        own = "decontaminate"
        limit = between(f"{own}.matches", high=self.max_matches)
        return [Rule(f"{own}.overlap", limit.column, limit.fails, by=f"{own}.task")]


@lru_cache(maxsize=2)
def _load(path: str, written: int) -> tuple[Any, dict[int, tuple[Any, Any, Any]]]:
    """The tasks' names; of each length, longest first: hashes, each one's task, which first bits occur.

    ``written``, the file's time, has a newer one read anew.
    """
    with np.load(path) as file:
        lengths = sorted(int(name.partition("_")[2]) for name in file.files if name.startswith("hashes_"))
        index = {}
        for length in reversed(lengths):
            hashes, seen = file[f"hashes_{length}"], np.zeros(1 << _BITS, np.bool_)
            seen[hashes >> _SHIFT] = True
            index[length] = (hashes, file[f"owners_{length}"], seen)
        return file["tasks"], index


def _strings(file: str) -> Iterator[str]:
    """Every text in every line's values."""
    with open(file, encoding="utf-8", errors="replace") as lines:
        for number, line in enumerate(lines, start=1):
            if not line.strip():
                continue
            try:
                row = json.loads(line)
            except ValueError as error:
                raise ValueError(f"{file}:{number}: not valid JSON ({error})") from error
            yield from _leaves(row)


def _leaves(value: Any) -> Iterator[str]:
    if isinstance(value, str):
        yield value
    elif isinstance(value, dict | list):
        for item in value.values() if isinstance(value, dict) else value:
            yield from _leaves(item)
