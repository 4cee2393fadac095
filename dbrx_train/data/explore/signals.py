"""Signals of passages: numbers by which to sort and filter them."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray

from dbrx_train.data.tokenizer import Tokenizer

__all__ = ["SIGNALS", "frequent_ngrams", "signals"]

SIGNALS = {
    "words": "words of the passage",
    "word length": "mean characters of a word",
    "letters": "share of characters that are letters",
    "digits": "share of characters that are digits",
    "repeated lines": "share of characters in lines that came before",
    "bytes per token": "UTF-8 bytes that a token stands for",
}
"""Name -> what it is, for people."""

_WORD = re.compile(r"\w+")
_BATCH = 512


def signals(texts: Sequence[str], tokenizer: Tokenizer) -> NDArray[np.float64]:
    """Each passage's signals, in the order of ``SIGNALS``: [passages, signals]."""
    return np.array([[*_counts(text), _bytes_per_token(text, tokenizer)] for text in texts]).reshape(
        len(texts), len(SIGNALS)
    )


def _counts(text: str) -> tuple[float, ...]:
    words, size = _WORD.findall(text), len(text)
    letters = sum(map(str.isalpha, text))
    digits = sum(map(str.isdigit, text))
    seen, repeated = set[str](), 0
    for line in text.splitlines():
        if line := line.strip():
            repeated += len(line) if line in seen else 0
            seen.add(line)
    mean = sum(map(len, words)) / max(1, len(words))
    return len(words), mean, letters / size, digits / size, repeated / size


def _bytes_per_token(text: str, tokenizer: Tokenizer) -> float:
    return len(text.encode()) / max(1, len(tokenizer.encode(text)))


def frequent_ngrams(texts: Sequence[str], length: int = 5, most: int = 12) -> list[tuple[str, int]]:
    """The word n-grams that most passages hold, with how many do; at least three of them.

    Those that share all but a word with one further up are left out, for they are of the same phrase.
    """
    counts: Counter[tuple[str, ...]] = Counter()
    for text in texts:
        words = text.split()
        counts.update({tuple(words[i : i + length]) for i in range(len(words) - length + 1)})
    found: list[tuple[str, ...]] = []
    for ngram, count in counts.most_common(20 * most):
        if count < 3 or len(found) == most:
            break
        if not any(_shifted(ngram, other) for other in found):
            found.append(ngram)
    return [(" ".join(ngram), counts[ngram]) for ngram in found]


def _shifted(one: tuple[str, ...], other: tuple[str, ...]) -> bool:
    return any(one[k:] == other[: len(other) - k] or other[k:] == one[: len(one) - k] for k in (1, 2, 3))
