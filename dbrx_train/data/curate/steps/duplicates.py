"""Keys by which equal and nearly equal documents are found over all sources, by :mod:`..similarity`."""

from __future__ import annotations

from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path

import numpy as np
import xxhash
from numpy.typing import NDArray

from dbrx_train.data.curate.batch import Batch, Tokens
from dbrx_train.data.curate.similarity import NOTHING, equal, similar
from dbrx_train.data.curate.step import CorpusStep
from dbrx_train.options import option

__all__ = ["ExactDuplicates", "NearDuplicates", "minhash"]


@dataclass
class ExactDuplicates(CorpusStep):
    """Remove documents whose text occurred before, in any source; the first one is kept."""

    name = "exact_duplicates"
    normalized: bool = option("Compare without regard to case and blanks.", True)

    def annotate(self, batch: Batch, work: Path) -> Batch:
        import pyarrow as pa

        texts = (" ".join(text.lower().split()) if self.normalized else text for text in batch.texts)
        keys = [xxhash.xxh3_128_digest(text.encode("utf-8", "surrogatepass")) for text in texts]
        return batch.with_columns({self.key: pa.array(keys, pa.binary(16))})

    def duplicates(self, keys: NDArray[np.uint8]) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
        return equal(keys.view("<u8"))


@dataclass
class NearDuplicates(CorpusStep):
    """Remove documents that share most of their runs of words with one before, in any source.

    MinHash (Broder 1997) with locality-sensitive hashing: signatures that agree in all rows of a band are
    candidates. FineWeb's 14 bands of 8 rows over runs of 5 words (arXiv 2406.17557) by default.
    """

    name = "near_duplicates"
    words: int = option("Words of a run.", 5, ge=1, le=50)
    bands: int = option("Bands of a signature.", 14, ge=1, le=128)
    rows: int = option("Rows of a band.", 8, ge=1, le=64)
    threshold: float = option("The least similarity of two documents, by their signatures.", 0.7, gt=0, le=1)

    def annotate(self, batch: Batch, work: Path) -> Batch:
        import pyarrow as pa

        signatures = minhash(batch.terms, self.words, self.bands * self.rows)
        size = signatures.shape[1] * signatures.itemsize
        buffer = pa.py_buffer(np.ascontiguousarray(signatures, "<u4"))
        array = pa.FixedSizeBinaryArray.from_buffers(pa.binary(size), len(signatures), [None, buffer])
        return batch.with_columns({self.key: array})

    def duplicates(self, keys: NDArray[np.uint8]) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
        return similar(keys.view("<u4"), self.bands, self.rows, self.threshold)


def minhash(terms: Tokens, words: int, permutations: int) -> NDArray[np.uint32]:
    """The least of each hash function over each text's runs of words, [texts, permutations].

    A text with fewer words is one run; one without any has the greatest number everywhere.
    """
    signatures = np.full((len(terms.counts), permutations), NOTHING, np.uint32)
    begins, hashes = terms.ngrams(words)
    owners = terms.owners[begins]
    starts = np.flatnonzero(np.diff(owners, prepend=-1))
    folded = _folded(hashes)
    whole = np.flatnonzero((terms.counts < words) & (terms.counts > 0))
    of_whole = [terms.hash_ngrams(terms.bounds[text : text + 1], int(terms.counts[text])) for text in whole]
    folded_whole = _folded(np.concatenate(of_whole)) if of_whole else np.empty(0, np.uint32)
    for number, (factor, addend) in enumerate(_functions(permutations)):
        if len(starts):
            least = np.minimum.reduceat(folded * factor + addend, starts)
            signatures[owners[starts], number] = least
        signatures[whole, number] = folded_whole * factor + addend
    return signatures


def _folded(hashes: NDArray[np.uint64]) -> NDArray[np.uint32]:
    return (hashes >> np.uint64(32)).astype(np.uint32)


@lru_cache(maxsize=4)
def _functions(count: int) -> tuple[tuple[np.uint32, np.uint32], ...]:
    """Factors, odd, and addends of as many hash functions modulo 2^32; the same everywhere."""
    draws = [xxhash.xxh3_64_intdigest(b"minhash %d" % number) for number in range(count)]
    return tuple((np.uint32(draw >> 32 | 1), np.uint32(draw & 0xFFFFFFFF)) for draw in draws)
