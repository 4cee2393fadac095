"""How much of a text repeats what was in it before."""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from dbrx_train.data.curate.batch import Tokens

__all__ = ["duplicate_ngrams", "repeated_shares"]

_OWNER = np.uint64(0xD6E8FEB86659FD93)


def repeated_shares(units: list[str]) -> tuple[float, float]:
    """The share of units (lines, paragraphs) that occurred before, and of the characters in these."""
    different = set(units)
    if len(different) == len(units):
        return 0.0, 0.0
    total, rest = sum(map(len, units)), sum(map(len, different))
    return 1 - len(different) / len(units), (total - rest) / total


def duplicate_ngrams(words: Tokens) -> dict[str, NDArray[np.float32]]:
    """Of each text, [texts]: ``top_2gram`` to ``top_4gram``, the share of its words' characters in the most
    common n-gram, and ``duplicate_5grams`` to ``duplicate_10grams``, that in n-grams that occurred before.

    An n-gram can only occur twice where the one shorter by a word does: only these are looked at next.
    """
    ends = np.zeros(len(words.ids) + 1, np.int64)
    np.cumsum(words.lengths, out=ends[1:])
    characters = np.maximum(words.sums(words.lengths), 1)
    found: dict[str, NDArray[np.float32]] = {}
    begins, hashes = words.ngrams(2)
    for n in range(2, 11):
        if n > 2:
            begins = begins[words.bounds[1:][words.owners[begins]] - begins >= n]
            hashes = words.hash_ngrams(begins, n)
        begins, groups = _repeated(begins, hashes ^ (words.owners[begins].astype(np.uint64) * _OWNER))
        if n <= 4:
            share = _most_common(words, begins, groups, ends, n) / characters
            found[f"top_{n}gram"] = share.astype(np.float32)
        else:
            share = words.sums(_covered(words, begins, groups, n) * words.lengths) / characters
            found[f"duplicate_{n}grams"] = share.astype(np.float32)
    return found


def _repeated(
    begins: NDArray[np.int64], hashes: NDArray[np.uint64]
) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
    """The n-grams that occur more than once, in order, and the number of the first of the same for each."""
    if not len(begins):
        return begins, begins
    order = np.argsort(hashes)
    ordered = hashes[order]
    starts = np.flatnonzero(np.concatenate([[True], ordered[1:] != ordered[:-1]]))
    counts = np.diff(np.append(starts, len(ordered)))
    first = np.empty(len(begins), np.int64)
    first[order] = np.repeat(np.minimum.reduceat(begins[order], starts), counts)
    many = np.empty(len(begins), np.bool_)
    many[order] = np.repeat(counts > 1, counts)
    return begins[many], first[many]


def _most_common(
    words: Tokens, begins: NDArray[np.int64], firsts: NDArray[np.int64], ends: NDArray[np.int64], n: int
) -> NDArray[np.int64]:
    """Characters in all occurrences of each text's most common n-gram, the longest of these; [texts]."""
    best = np.zeros(len(words.counts), np.int64)
    if len(begins):
        first, counts = np.unique(firsts, return_counts=True)
        lengths = ends[first + n] - ends[first]
        np.maximum.at(best, words.owners[first], (counts << 32) + lengths)
    return (best >> 32) * (best & 0xFFFFFFFF)


def _covered(
    words: Tokens, begins: NDArray[np.int64], firsts: NDArray[np.int64], n: int
) -> NDArray[np.bool_]:
    """Which words lie in an n-gram that occurred before; [words]."""
    again = begins[begins != firsts]
    edges = np.zeros(len(words.ids) + 1, np.int64)
    np.add.at(edges, again, 1)
    np.add.at(edges, again + n, -1)
    covered: NDArray[np.bool_] = np.cumsum(edges[:-1]) > 0
    return covered
