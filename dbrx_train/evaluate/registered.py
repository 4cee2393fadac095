"""A registered checkpoint as MLflow loads it: ``mlflow.pyfunc.load_model("models:/name@alias")``."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterable
from functools import partial
from pathlib import Path
from typing import Any

from dbrx_train.checkpoint.registry import CARD, OPTIONS
from dbrx_train.errors import aside
from dbrx_train.evaluate.text import continue_text

__all__ = ["TextModel"]


class TextModel:
    """Continues prompts with the weights that a card names, as ``dbrx-train generate`` does."""

    def __init__(self, weights: Path) -> None:
        self.weights = weights

    def predict(self, model_input: Any, params: dict[str, Any] | None = None) -> list[str]:
        """A continuation of each prompt: strings, or a data frame with a column ``prompt``.

        ``params``: any of ``OPTIONS``.
        """
        prompts: Iterable[str] = model_input["prompt"] if hasattr(model_input, "columns") else model_input
        options: dict[str, Any] = {key: value for key, _, value in OPTIONS} | (params or {})
        write: Callable[..., Iterable[str]] = partial(continue_text, int8=False, aside=aside, **options)
        return ["".join(write(self.weights, prompt)) for prompt in prompts]


def _load_pyfunc(path: str) -> TextModel:
    """MLflow's way in."""
    card = json.loads((Path(path) / CARD).read_text(encoding="utf-8"))
    return TextModel(Path(card["weights"]))
