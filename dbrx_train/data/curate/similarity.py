"""Which documents are equal, or nearly so, to one before them, by keys alone."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterator

import numpy as np
from numpy.typing import NDArray

__all__ = ["NOTHING", "equal", "similar"]

NOTHING = np.uint32(0xFFFFFFFF)
"""In all of a signature: of a text without words, which is like no other."""
_FACTOR = np.uint64(0x9E3779B97F4A7C15)
_CHUNK = 1 << 16
_KEPT = 100

Found = tuple[NDArray[np.int64], NDArray[np.int64]]


def equal(keys: NDArray[np.uint64]) -> Found:
    """The rows of keys, [documents, 2], that occurred before, in order, and the first of the same of each."""
    order = np.lexsort((keys[:, 1], keys[:, 0]))  # stable: the first of equal ones comes first
    ordered = keys[order]
    starts = np.concatenate([[True], (ordered[1:] != ordered[:-1]).any(axis=1)])[: len(order)]
    first = order[np.flatnonzero(starts)][np.cumsum(starts) - 1]
    removed, originals = order[~starts], first[~starts]
    back = np.argsort(removed)
    return removed[back], originals[back]


def similar(signatures: NDArray[np.uint32], bands: int, rows: int, threshold: float) -> Found:
    """The documents whose signature is like that of a kept one before, in order, and which that is.

    Two are compared if all ``rows`` of one of ``bands`` agree, and are alike if at least ``threshold`` of all
    rows do. Comparing with kept ones alone makes no chains: that a is like b and b like c removes c only if
    it is like a. Of what shares a band, the first hundred that are kept are compared with.

    Args:
        signatures: [documents, bands * rows]; may be a memory map, of which some rows at a time are read.
    """
    kept: dict[tuple[int, int], list[int]] = defaultdict(list)
    removed, originals = list[int](), list[int]()
    for document, groups in _candidates(signatures, bands, rows):
        others = sorted({other for group in groups for other in kept[group]})
        if others:
            alike = (signatures[others] == signatures[document]).mean(axis=1) >= threshold
            if alike.any():
                removed.append(document)
                originals.append(others[int(alike.argmax())])
                continue
        for group in groups:
            if len(kept[group]) < _KEPT:
                kept[group].append(document)
    return np.array(removed, np.int64), np.array(originals, np.int64)


def _candidates(
    signatures: NDArray[np.uint32], bands: int, rows: int
) -> Iterator[tuple[int, list[tuple[int, int]]]]:
    """Each document that shares a band with another, in order, and the bands (and their groups) it shares."""
    keys = np.empty((bands, len(signatures)), np.uint64)
    some = np.empty(len(signatures), np.bool_)
    for start in range(0, len(signatures), _CHUNK):
        chunk = signatures[start : start + _CHUNK].astype(np.uint64)
        some[start : start + _CHUNK] = (chunk != NOTHING).any(axis=1)
        for band in range(bands):
            mixed = chunk[:, band * rows]
            for row in range(1, rows):
                mixed = mixed * _FACTOR + chunk[:, band * rows + row]
            keys[band, start : start + _CHUNK] = mixed
    documents, groups, of_band = [], [], []
    here = np.flatnonzero(some)
    for band in range(bands):
        _, group, counts = np.unique(keys[band, here], return_inverse=True, return_counts=True)
        shared = np.flatnonzero(counts[group] > 1)
        documents.append(here[shared])
        groups.append(group[shared])
        of_band.append(np.full(len(shared), band))
    document, group, band_of = map(np.concatenate, (documents, groups, of_band))
    order = np.argsort(document, kind="stable")
    bounds = np.flatnonzero(np.diff(document[order], prepend=-1, append=-1))
    for begin, end in zip(bounds[:-1].tolist(), bounds[1:].tolist(), strict=True):
        of = order[begin:end]
        yield int(document[of[0]]), list(zip(band_of[of].tolist(), group[of].tolist(), strict=True))
