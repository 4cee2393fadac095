"""Time in a run: durations as text (Composer's time strings), and the clock that relates their units.

Optimizer steps need not be alike. The global batch may grow, and the samples may become longer while a step
keeps its tokens. A run is therefore a row of stages of equal steps, and tokens, samples and steps are
piecewise linear functions of one another. They follow from the configuration alone, never from what a run
has done so far.
"""

from __future__ import annotations

import bisect
import math
import re
from dataclasses import dataclass, replace
from fractions import Fraction
from functools import cached_property
from typing import Literal, TypeAlias, cast

Unit: TypeAlias = Literal["tok", "sp", "ba"]
"""Tokens, samples, batches (optimizer steps)."""

_TIME = re.compile(r"\s*(\d[\d_]*(?:\.\d+)?(?:e\d+)?)\s*([KMBT]?)\s*(tok|sp|ba|dur)\s*")
_MAGNITUDE = {"": 1, "K": 10**3, "M": 10**6, "B": 10**9, "T": 10**12}


def parse_time(text: str | int, field: str, relative: bool = True) -> tuple[Fraction, Unit | Literal["dur"]]:
    """Read ``"2_000_000tok"``, ``"2B tok"``, ``"100sp"``, ``"10ba"`` or ``"0.7dur"``: a number and its unit.

    Units are tokens, samples, batches (optimizer steps) and, if it may be ``relative``, the run's duration.

    Raises:
        ValueError: anything else (a bare 0 is 0 tokens); the message begins with ``field``.
    """
    match = _TIME.fullmatch("0tok" if text in (0, "0") else str(text))
    if not match or (match[3] == "dur" and not relative):
        what = "is relative to the run's length" if match else "is not a time"
        epochs = ", for sources of a mix have no epoch in common" if str(text).endswith("ep") else ""
        like = "2B tok, 1_000_000tok, 0.7dur or 10ba" if relative else "2B tok, 1_000_000tok or 1000ba"
        raise ValueError(f"{field}: {text!r} {what}{epochs}; write it like {like}")
    number, magnitude, unit = match.groups()
    return Fraction(number.replace("_", "")) * _MAGNITUDE[magnitude], cast(Unit, unit)


_SPAN = re.compile(r"(?=\d)(?:(\d+)d)?(?:(\d+)h)?(?:(\d+)m)?(?:(\d+)s)?")


def parse_span(text: str, field: str) -> int:
    """Read a span of wall time, such as ``"3h50m"``, ``"90s"`` or ``"2d"``, as seconds.

    Raises:
        ValueError: anything else, or nothing; the message begins with ``field``.
    """
    match = _SPAN.fullmatch(text)
    parts = [int(part or 0) for part in match.groups()] if match else [0]
    seconds = sum(part * unit for part, unit in zip(parts, (86400, 3600, 60, 1), strict=False))
    if not seconds:
        raise ValueError(f"{field}: {text!r} is not a span of time; write it like 3h50m, 90s or 2d")
    return seconds


@dataclass(frozen=True)
class Stage:
    """Optimizer steps that are alike, up to the next stage.

    Attributes:
        token, sample, batch: what the run has seen when the stage begins.
        tokens_per_batch: tokens of a step, over all ranks.
        seq_len: tokens per sample.
    """

    token: int
    sample: int
    batch: int
    tokens_per_batch: int
    seq_len: int

    @property
    def global_batch_size(self) -> int:
        """Samples of a step, over all ranks."""
        return self.tokens_per_batch // self.seq_len

    def __str__(self) -> str:
        return f"a step of {self.global_batch_size} samples of {self.seq_len} tokens"

    def begin(self, unit: Unit) -> int:
        """What the run has seen when the stage begins."""
        return {"tok": self.token, "sp": self.sample, "ba": self.batch}[unit]

    def per_batch(self, unit: Unit) -> int:
        return {"tok": self.tokens_per_batch, "sp": self.global_batch_size, "ba": 1}[unit]

    def at_batch(self, batch: int) -> Stage:
        """The same, begun when the run had done ``batch`` steps."""
        more = batch - self.batch
        return replace(
            self,
            token=self.token + more * self.tokens_per_batch,
            sample=self.sample + more * self.global_batch_size,
            batch=batch,
        )


@dataclass(frozen=True)
class Clock:
    """Relates tokens, samples and optimizer steps of a run.

    >>> clock = Clock.of("100ba", seq_len=512, global_batch_size=8).with_seq_len("0.9dur", 4096)
    >>> [(stage.batch, stage.global_batch_size, stage.seq_len) for stage in clock.stages]
    [(0, 8, 512), (90, 1, 4096)]

    Attributes:
        stages: from the run's beginning on; the last has no end, so that a run may be prolonged.
        end: the run's length as given, in ``tok`` or ``ba``; its last step is whole.
    """

    stages: tuple[Stage, ...]
    end: tuple[Fraction, Unit]

    @classmethod
    def of(cls, max_duration: str, *, seq_len: int, global_batch_size: int) -> Clock:
        """The clock of a run of equal steps, as long as ``max_duration``, which is in tok, sp or ba.

        Raises:
            ValueError: it is not, or is nothing.
        """
        number, unit = parse_time(max_duration, "max_duration", relative=False)
        if number <= 0:
            raise ValueError(f"max_duration: {max_duration!r} is no length; must be longer than nothing")
        if unit == "sp":
            number, unit = number * seq_len, "tok"
        end = number, cast(Unit, unit)
        return cls((Stage(0, 0, 0, global_batch_size * seq_len, seq_len),), end)

    def with_batch_size(self, at: str, global_batch_size: int) -> Clock:
        """The clock with that many samples a step, from the first step that begins at ``at`` or later.

        To be called in the order of time, and before ``with_seq_len``.

        Raises:
            ValueError: beginning with ``until``: it is out of order, or relative to the run, whose length
                depends on it.
        """
        parse_time(at, "until", relative=False)
        edge = self.first_step(at)
        if edge.batch <= self.stages[-1].batch:
            raise ValueError(f"until: {at!r} leaves no step for this size; order the sizes by time")
        grown = replace(edge, tokens_per_batch=global_batch_size * edge.seq_len)
        return replace(self, stages=(*self.stages, grown))

    def with_seq_len(self, at: str, seq_len: int) -> Clock:
        """The clock with samples of ``seq_len`` tokens, from the first step that begins at ``at`` or later.

        Steps keep their tokens.

        Raises:
            ValueError: beginning with ``seq_len``: it does not divide them.
        """
        edge = self.first_step(at)
        stages = [stage for stage in self.stages if stage.batch < edge.batch]
        following = edge
        for stage in (edge, *(stage for stage in self.stages if stage.batch > edge.batch)):
            if stage.tokens_per_batch % seq_len:
                raise ValueError(f"seq_len: {stage} does not split into samples of {seq_len}")
            following = replace(
                following.at_batch(stage.batch), tokens_per_batch=stage.tokens_per_batch, seq_len=seq_len
            )
            stages.append(following)
        return replace(self, stages=tuple(stages))

    @cached_property
    def total_batches(self) -> int:
        """Optimizer steps of the run."""
        number, unit = self.end
        return math.ceil(self.convert(number, unit, "ba"))

    @cached_property
    def total_tokens(self) -> int:
        return int(self.convert(self.total_batches, "ba", "tok"))

    @cached_property
    def total_samples(self) -> int:
        return int(self.convert(self.total_batches, "ba", "sp"))

    def stage(self, number: Fraction | int, unit: Unit) -> Stage:
        """The stage of the step that comes after ``number`` tokens, samples or batches."""
        after = bisect.bisect_right(self.stages, number, key=lambda stage: stage.begin(unit))
        return self.stages[after - 1]

    def convert(self, number: Fraction | int, unit: Unit, to: Unit) -> Fraction:
        """A moment, given by what the run has seen in one unit, in another."""
        stage = self.stage(number, unit)
        batches = Fraction(number - stage.begin(unit)) / stage.per_batch(unit)
        return stage.begin(to) + batches * stage.per_batch(to)

    def tokens(self, text: str, field: str = "duration") -> int:
        """Tokens seen at the moment ``text``; ValueError, beginning with ``field``, if it is no time."""
        return round(self._moment(text, field))

    def samples(self, text: str, field: str = "duration") -> Fraction:
        """Samples seen at the moment ``text``, as for ``tokens``."""
        return self.convert(self._moment(text, field), "tok", "sp")

    def first_step(self, text: str, field: str = "at") -> Stage:
        """The stage of the first step that begins at the moment ``text`` or later, begun there."""
        batch = math.ceil(self.convert(self._moment(text, field), "tok", "ba"))
        return self.stage(batch, "ba").at_batch(batch)

    def before_end(self, text: str, field: str = "duration") -> int:
        """Tokens seen when so much of the run is left."""
        number, unit = parse_time(text, field)
        if unit == "dur":
            return round(self.total_tokens * max(Fraction(0), 1 - number))
        whole = {"tok": self.total_tokens, "sp": self.total_samples, "ba": self.total_batches}[unit]
        return round(self.convert(max(Fraction(0), whole - number), unit, "tok"))

    def interval(self, text: str) -> str:
        """How often, as Composer takes it: in whole tokens, samples or batches, at least one."""
        number, unit = parse_time(text, "interval")
        if unit == "dur":
            number, unit = number * self.total_tokens, "tok"
        return f"{max(1, math.ceil(number))}{unit}"

    def _moment(self, text: str, field: str) -> Fraction:
        number, unit = parse_time(text, field)
        return number * self.total_tokens if unit == "dur" else self.convert(number, unit, "tok")


def samples_of(batch_size: int, base: int, seq_len: int) -> int:
    """Samples of ``seq_len`` tokens with the tokens of ``batch_size`` samples of ``base``; at least one."""
    return max(1, batch_size * base // seq_len)
