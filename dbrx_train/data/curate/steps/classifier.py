"""A quality score by a fastText classifier that the user brings, as DCLM's (arXiv 2406.11794)."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import numpy as np

from dbrx_train.data.curate.batch import Batch
from dbrx_train.data.curate.fasttext_model import load_model
from dbrx_train.data.curate.step import Rule, Step, between
from dbrx_train.options import option

__all__ = ["Classifier"]


@dataclass(kw_only=True)
class Classifier(Step):
    """Keep documents that a classifier gives a label with enough probability."""

    name = "classifier"
    model: str = option("names a fastText model: a .bin or .ftz file.")
    label: str = option("The label of what is to be kept, as __label__hq.", "__label__hq")
    min_score: float = option("The least probability of that label.", 0.5, ge=0, le=1)
    characters: int = option("How much of a document's beginning is read.", 20_000, gt=0)

    def files(self) -> list[str]:
        return [self.model]

    def build(self, work: Path) -> None:
        model = load_model(self.model)
        known = sorted(label for label, _ in self._predictions(model, "the"))
        if self.label not in known:
            raise ValueError(
                f"classifier.label: {self.model} has no label {self.label!r}; it has {', '.join(known[:8])}"
            )

    def annotate(self, batch: Batch, work: Path) -> Batch:
        model = load_model(self.model)
        found = [
            dict(self._predictions(model, text[: self.characters].replace("\n", " "))).get(self.label, 0.0)
            for text in batch.texts
        ]
        return batch.with_columns({"classifier.score": np.array(found, np.float32)})

    @staticmethod
    def _predictions(model: object, text: str) -> list[tuple[str, float]]:
        labels, scores = model.predict(text, k=-1, threshold=-1.0)  # type: ignore[attr-defined]
        return [(label, min(float(score), 1.0)) for label, score in zip(labels, scores, strict=True)]

    def rules(self) -> list[Rule]:
        return [between("classifier.score", low=self.min_score)]
