"""Which optimizer steps are bad: not finite, or far above what is usual."""

from __future__ import annotations

import math
from collections import deque
from collections.abc import Iterable, Mapping
from statistics import median
from typing import Any

__all__ = ["RollingStats", "SpikeDetector"]

_LEAST_DEVIATION = 0.05  # of a logarithm: a quantity that hardly moves has none, and may yet move by 5 %


class RollingStats:
    """What a positive quantity usually is, from the latest ``window`` good values.

    In logarithms, for losses and gradient norms vary in proportion to themselves, with long tails upwards.
    """

    def __init__(self, window: int, values: Iterable[float] = ()) -> None:
        self.values = deque(values, maxlen=window)

    def add(self, value: float) -> None:
        if value > 0:  # a gradient of 0 says nothing about others
            self.values.append(value)

    def limit(self, deviations: float) -> float:
        """So many median absolute deviations above the median."""
        logs = [math.log(value) for value in self.values]
        middle = median(logs)
        deviation = max(_LEAST_DEVIATION, median(abs(log - middle) for log in logs))
        return math.exp(min(middle + deviations * deviation, 700.0))  # below what overflows


class SpikeDetector:
    """Judges one step after another, and counts the bad ones in a row, and roll-backs.

    What it says follows from what it was asked alone, so ranks that ask the same are told the same.

    Args:
        window: good values, the latest, that say what is usual.
        warmup: good values before a finite one can be bad.
        mad_threshold: median absolute deviations above the median at which one is; None: never.
    """

    def __init__(self, window: int, warmup: int, mad_threshold: float | None) -> None:
        self.window, self.warmup, self.mad_threshold = window, warmup, mad_threshold
        self.usual = {name: RollingStats(window) for name in ("loss", "gradient norm")}
        self.row = 0
        """Bad steps in a row, up to now."""
        self.finite = 0
        """How many of them were finite."""
        self.skipped = 0
        """Bad steps of the whole run."""
        self.rollbacks = 0
        """Those of one trouble: it is over once the run has come ``window`` steps further than ever."""
        self.over_at = 0

    def judge(self, step: int, found: Mapping[str, float]) -> str | None:
        """What is wrong with a step, of which ``loss`` and ``gradient norm`` were found; None if it is good.

        Good values alone count as usual from then on. ``step`` is the steps that the run had behind it.
        """
        wrong = next((cause for cause in map(self._wrong, found, found.values()) if cause), None)
        if wrong is not None:
            self.row += 1
            self.finite += all(map(math.isfinite, found.values()))
            self.skipped += 1
            return wrong
        for name, value in found.items():
            self.usual[name].add(value)
        self.row = self.finite = 0
        if step >= self.over_at:
            self.rollbacks = 0
        return None

    def _wrong(self, name: str, value: float) -> str | None:
        if not math.isfinite(value):
            return f"{name} is {value}"
        usual, deviations = self.usual[name], self.mad_threshold
        if deviations is None or len(usual.values) < self.warmup:
            return None
        limit = usual.limit(deviations)
        return f"{name} is {value:.4g}, over {limit:.4g}" if value > limit else None

    def roll_back(self, step: int, saved: Mapping[str, Any] | None) -> dict[str, Any]:
        """The state to go on with after a roll-back at ``step``.

        ``saved``: that of the checkpoint; None where only the weights go back.

        A row of finite steps alone may be a new level that is there to stay, as of other data: so what is
        usual is learned anew, or the run would be rolled back for ever.
        """
        state = self.state_dict() | dict(saved or {})
        if self.finite == self.row:
            state["usual"] = {name: [] for name in self.usual}
        later = max(self.over_at, step + self.window)
        counts = {"skipped": self.skipped, "rollbacks": self.rollbacks + 1, "over_at": later}
        return state | {"row": 0, "finite": 0} | counts

    def state_dict(self) -> dict[str, Any]:
        """Plain values from which ``load_state_dict`` goes on alike."""
        return {
            "usual": {name: list(usual.values) for name, usual in self.usual.items()},
            **{name: getattr(self, name) for name in ("row", "finite", "skipped", "rollbacks", "over_at")},
        }

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        for name, values in state["usual"].items():
            self.usual[name] = RollingStats(self.window, values)
        for name in ("row", "finite", "skipped", "rollbacks", "over_at"):
            setattr(self, name, state[name])
