"""Lengths of training as text (Composer's time strings) and their conversion to tokens."""

from __future__ import annotations

import math
import re
from dataclasses import dataclass
from fractions import Fraction

_TIME = re.compile(r"\s*(\d[\d_]*(?:\.\d+)?(?:e\d+)?)\s*([KMBT]?)\s*(tok|sp|ba|dur)\s*")
_MAGNITUDE = {"": 1, "K": 10**3, "M": 10**6, "B": 10**9, "T": 10**12}


def parse_time(text: str | int, field: str) -> tuple[Fraction, str]:
    """Read ``"2_000_000tok"``, ``"2B tok"``, ``"100sp"``, ``"10ba"`` or ``"0.7dur"``: a number and its unit.

    Units are tokens, samples, batches (optimizer steps) and the run's duration.

    Raises:
        ValueError: anything else (a bare 0 is 0 tokens); the message begins with ``field``.
    """
    match = _TIME.fullmatch("0tok" if text in (0, "0") else str(text))
    if not match:
        raise ValueError(
            f"{field}: {text!r} is not a time; write it like 2B tok, 1_000_000tok, 0.7dur or 10ba"
        )
    number, magnitude, unit = match.groups()
    return Fraction(number.replace("_", "")) * _MAGNITUDE[magnitude], unit


@dataclass(frozen=True)
class Clock:
    """Converts durations to tokens, for a run of known length and batch size.

    Attributes:
        seq_len: tokens per sample.
        global_batch_size: samples per optimizer step, over all ranks.
        total_batches: optimizer steps of the run; its last step is whole.
    """

    seq_len: int
    global_batch_size: int
    total_batches: int

    @classmethod
    def of(cls, max_duration: str, *, seq_len: int, global_batch_size: int) -> Clock:
        """The clock of a run as long as ``max_duration``, which is in tok, sp or ba."""
        number, unit = parse_time(max_duration, "max_duration")
        if unit == "dur" or number <= 0:
            raise ValueError(f"max_duration: {max_duration!r} is no length of its own; give it in tok or ba")
        per_unit = {"tok": Fraction(1, seq_len * global_batch_size), "sp": Fraction(1, global_batch_size)}
        return cls(seq_len, global_batch_size, math.ceil(number * per_unit.get(unit, Fraction(1))))

    @property
    def tokens_per_batch(self) -> int:
        return self.global_batch_size * self.seq_len

    @property
    def total_tokens(self) -> int:
        return self.total_batches * self.tokens_per_batch

    def tokens(self, text: str, field: str = "duration") -> int:
        """``text`` in tokens; ValueError, beginning with ``field``, if it is no time."""
        number, unit = parse_time(text, field)
        sizes = {"tok": 1, "sp": self.seq_len, "ba": self.tokens_per_batch, "dur": self.total_tokens}
        return round(number * sizes[unit])

    def batches(self, text: str) -> int:
        """``text`` as whole optimizer steps, at least one."""
        return max(1, math.ceil(self.tokens(text) / self.tokens_per_batch))
