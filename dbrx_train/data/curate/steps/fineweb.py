"""FineWeb's own rules (Penedo et al. 2024, arXiv 2406.17557, section 3.5)."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import numpy as np

from dbrx_train.data.curate.batch import Batch
from dbrx_train.data.curate.repetition import repeated_shares
from dbrx_train.data.curate.step import Rule, Step, between
from dbrx_train.options import option

__all__ = ["FineWeb"]

_TERMINAL = (".", "!", "?", '"', "'", "”", "。", "\uff01", "\uff1f", "؟", "।")


@dataclass
class FineWeb(Step):
    """Remove lists, menus and what repeats its lines."""

    name = "fineweb"
    min_punctuated_lines: float = option("Share of lines that end as a sentence, at least.", 0.12, ge=0, le=1)
    max_short_lines: float = option("Share of lines that are short, at most.", 0.67, ge=0, le=1)
    short_line: int = option("Characters under which a line is short.", 30, ge=0)
    max_duplicate_line_characters: float = option(
        "Share of characters in lines that occurred before, at most (datatrove's code has 0.01).",
        0.1,
        ge=0,
        le=1,
    )

    def annotate(self, batch: Batch, work: Path) -> Batch:
        rows = [self._signals(lines) for lines in batch.lines]
        columns = np.array(rows, np.float32).reshape(-1, 3).T
        names = ("punctuated_lines", "short_lines", "duplicate_line_characters")
        return batch.with_columns(
            {f"fineweb.{name}": column for name, column in zip(names, columns, strict=True)}
        )

    def _signals(self, lines: list[str]) -> tuple[float, float, float]:
        count = max(1, len(lines))
        punctuated = sum(line.endswith(_TERMINAL) for line in lines) / count
        short = sum(len(line) < self.short_line for line in lines) / count
        return punctuated, short, repeated_shares(lines)[1]

    def rules(self) -> list[Rule]:
        return [
            between("fineweb.punctuated_lines", low=self.min_punctuated_lines),
            between("fineweb.short_lines", high=self.max_short_lines),
            between("fineweb.duplicate_line_characters", high=self.max_duplicate_line_characters),
        ]
