"""A cluster as a filter: so many of these terms, and a document is of the cluster.

A cluster is a region of a space that only this sample's vocabulary spans. A recipe wants something that any
document can be asked, anywhere: a few words and a threshold, chosen here to agree with the cluster as far as
they can, with how far that is.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

__all__ = ["FittedFilter", "TermFilter", "term_filters"]

_WORD = re.compile(r"[^\W\d]\w{2,}")


@dataclass(frozen=True)
class TermFilter:
    """Matches texts that hold at least ``at_least`` of ``terms``, as whole words in any case."""

    terms: tuple[str, ...]
    at_least: int

    def matches(self, text: str) -> bool:
        return len(set(_WORD.findall(text.lower())).intersection(self.terms)) >= self.at_least


@dataclass(frozen=True)
class FittedFilter:
    """A filter with how well it tells the passages of its cluster from others."""

    filter: TermFilter
    precision: float
    recall: float

    def recipe(self, title: str) -> str:
        """A step of a recipe, as YAML."""
        terms = ", ".join(self.filter.terms)
        return (
            f"# cluster: {title}\n"
            f"# of the passages that were looked at, it matches {self.recall:.0%} of the cluster's;\n"
            f"# of those it matches, {self.precision:.0%} are of the cluster\n"
            f"- terms:\n    drop_if_at_least: {self.filter.at_least}\n    terms: [{terms}]\n"
        )


def term_filters(
    texts: Sequence[str], cluster: NDArray[np.int64], terms: Sequence[Sequence[str]]
) -> list[FittedFilter]:
    """The filter of each cluster, with the threshold of the greatest F1."""
    number = {term: i for i, term in enumerate(dict.fromkeys(term for each in terms for term in each))}
    holds = np.zeros((len(texts), len(number)), bool)
    for row, text in zip(holds, texts, strict=True):
        row[[number[word] for word in set(_WORD.findall(text.lower())) if word in number]] = True
    found = []
    for c, mine in enumerate(terms):
        counts = holds[:, [number[term] for term in mine]].sum(1)
        found.append(_best(tuple(mine), counts, cluster == c))
    return found


def _best(terms: tuple[str, ...], counts: NDArray[np.int64], inside: NDArray[np.bool_]) -> FittedFilter:
    best, best_f1 = FittedFilter(TermFilter(terms, 1), 0.0, 0.0), -1.0
    for at_least in range(1, len(terms) + 1):
        matched = counts >= at_least
        hits = int((matched & inside).sum())
        precision, recall = hits / max(1, int(matched.sum())), hits / max(1, int(inside.sum()))
        f1 = 2 * precision * recall / max(1e-9, precision + recall)
        if f1 > best_f1:
            best, best_f1 = FittedFilter(TermFilter(terms, at_least), precision, recall), f1
    return best
