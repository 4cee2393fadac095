"""What a step of a recipe is: options, columns that it adds, and rules that say which documents fail.

Steps annotate, and nothing else: what becomes of a document is decided at the end, by the first rule that it
fails in the recipe's order (:func:`decide`). So each rule is counted as it works alone, too.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from dbrx_train.data.curate.batch import Batch
from dbrx_train.options import option

__all__ = ["EMPTY", "CorpusStep", "Rule", "Step", "between", "decide", "judge"]


@dataclass(frozen=True)
class Rule:
    """Which documents fail, by one column."""

    name: str
    """STEP.RULE"""
    column: str
    fails: Callable[[NDArray[Any]], NDArray[np.bool_]]
    by: str | None = None
    """A column of text by which those that fail are counted, too."""


@dataclass
class Step:
    """Options of a step, and what it does; each is a dataclass of its own."""

    name = ""
    sources: list[str] | None = option("The sources whose documents it looks at; null: all.", None)

    def looks_at(self, source: str) -> bool:
        """Whether a source's documents go through it."""
        return self.sources is None or source in self.sources

    @property
    def totals(self) -> tuple[str, ...]:
        """Columns of counts whose sums over the kept documents are reported."""
        return ()

    def fields(self) -> list[str]:
        """Fields that the sources must keep."""
        return []

    def files(self) -> list[str]:
        """Files that decide the result, besides the sources."""
        return []

    def build(self, work: Path) -> None:
        """Make what all parts need, once, in the folder ``work`` that all of them see."""

    def annotate(self, batch: Batch, work: Path) -> Batch:
        """The batch with columns added, or texts replaced; depends on each document alone."""
        raise NotImplementedError

    def rules(self) -> Sequence[Rule]:
        """Which documents fail."""
        return ()


@dataclass
class CorpusStep(Step):
    """A step that looks at all documents together: each gets a key, and by the keys some are removed."""

    @property
    def key(self) -> str:
        """The column of keys, bytes of one length."""
        return f"{self.name}.key"

    def duplicates(self, keys: NDArray[np.uint8]) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
        """The documents to remove, in order, and for each which one before it is kept.

        Args:
            keys: of the documents that are left, in the order of the recipe's sources, [documents, bytes];
                may be a memory map.
        """
        raise NotImplementedError


def between(
    name: str, low: float | None = None, high: float | None = None, column: str | None = None
) -> Rule:
    """Fails below ``low`` or above ``high``."""

    def fails(values: NDArray[Any]) -> NDArray[np.bool_]:
        found = np.zeros(len(values), np.bool_)
        if low is not None:
            found |= values < low
        if high is not None:
            found |= values > high
        return found

    return Rule(name, column or name, fails)


EMPTY = "read.empty"
"""The rule before all others: nothing but blanks."""


def judge(batch: Batch, steps: Sequence[Step]) -> dict[str, NDArray[np.bool_]]:
    """Which documents fail each rule, in the recipe's order; [documents] each."""
    blank = [not text.strip() for text in batch.texts]
    found = {EMPTY: np.array(blank, np.bool_)}
    for step in steps:
        for rule in step.rules():
            found[rule.name] = rule.fails(batch.numbers(rule.column))
    return found


def decide(failed: dict[str, NDArray[np.bool_]], count: int) -> list[str | None]:
    """The first rule that each document fails; None for those that are kept."""
    reasons: list[str | None] = [None] * count
    for name, fails in failed.items():
        for row in np.flatnonzero(fails):
            if reasons[row] is None:
                reasons[row] = name
    return reasons
