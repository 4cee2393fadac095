"""Lengths of training as text (Composer's time strings) and their conversion to tokens."""

from __future__ import annotations

import math
import re
from dataclasses import dataclass

_FORM = re.compile(r"^\s*([0-9][0-9_]*(?:\.[0-9]+)?|\.[0-9]+)\s*([KMBT]?)\s*(tok|ba|dur)\s*$")
_SCALE = {"": 1, "K": 10**3, "M": 10**6, "B": 10**9, "T": 10**12}


def parse_duration(text: str) -> tuple[float, str]:
    """``"2B tok"`` -> ``(2e9, "tok")``: a number and its unit, ``tok``, ``ba`` (batches) or ``dur`` (run).

    Raises:
        ValueError: the text has another form.
    """
    match = _FORM.match(str(text))
    if match is None:
        raise ValueError(f"{text!r} is not a duration such as '10ba', '2_000_000tok', '2B tok' or '0.9dur'")
    number, scale, unit = match.groups()
    if unit == "dur" and scale:
        raise ValueError(f"{text!r}: a fraction of the run takes no {scale}")
    return float(number.replace("_", "")) * _SCALE[scale], unit


@dataclass(frozen=True)
class Clock:
    """Converts durations to tokens, for a run of known length and batch size.

    Attributes:
        tokens_per_batch: tokens of one optimizer step over all ranks.
        total_batches: optimizer steps of the run; its last step is whole.
    """

    tokens_per_batch: int
    total_batches: int

    @classmethod
    def of(cls, max_duration: str, *, tokens_per_batch: int) -> Clock:
        value, unit = parse_duration(max_duration)
        if unit == "dur":
            raise ValueError(f"{max_duration!r}: the length of the run is given in tok or ba")
        batches = value if unit == "ba" else value / tokens_per_batch
        return cls(tokens_per_batch, max(1, math.ceil(batches)))

    @property
    def total_tokens(self) -> int:
        return self.total_batches * self.tokens_per_batch

    def tokens(self, text: str) -> int:
        """``text`` as tokens seen since the run's start.

        Raises:
            ValueError: ``text`` is no duration.
        """
        value, unit = parse_duration(text)
        if unit == "dur":
            return round(value * self.total_tokens)
        return round(value * self.tokens_per_batch) if unit == "ba" else round(value)

    def batches(self, text: str) -> int:
        """``text`` as whole optimizer steps, at least one."""
        return max(1, math.ceil(self.tokens(text) / self.tokens_per_batch))
