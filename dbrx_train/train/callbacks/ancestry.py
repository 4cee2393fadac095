"""Which weights a run began with, as its checkpoints say it."""

from __future__ import annotations

from typing import Any

from dbrx_train.checkpoint.lineage import Lineage
from dbrx_train.train.train_state import StatefulCallback


class Ancestry(StatefulCallback):
    """Keeps the lineage of the weights that the run began with, through all of its starts."""

    key = "base"

    def __init__(self) -> None:
        self.base: Lineage | None = None
        """None if the run began with drawn weights."""

    def state_dict(self) -> dict[str, Any]:
        return {} if self.base is None else self.base.to_dict()

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.base = Lineage.from_dict(state) if state else None
