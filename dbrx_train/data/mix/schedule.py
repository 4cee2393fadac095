"""The mix of sources as an exact function of training time.

A schedule says what share of the samples each source has at every moment of a run. It answers, for any moment
and without walking there, how many samples each source has given so far (``counts``) and which sample comes
next (``order``). It is integer arithmetic alone (see ``apportionment``), so that every rank, restart and
machine gets the same answer.

Time is counted in *ticks*: one tick is one sample on every canonical node; with one canonical node, the
default, a tick is a sample. Each canonical node runs the schedule on its own, a little out of phase with the
others, so that together they follow it more closely than any of them alone.
"""

from __future__ import annotations

import bisect
import itertools
import math
import warnings
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from fractions import Fraction
from typing import Any, Final, Literal, TypeAlias, get_args

import numpy as np
from numpy.typing import ArrayLike, NDArray

from dbrx_train.data.mix.apportionment import DENOMINATOR, Apportionment, Floats, Ints, integer_weights
from dbrx_train.schedule import Clock

__all__ = ["MixPoint", "MixSchedule"]

Interpolation: TypeAlias = Literal["step", "linear"]
Side: TypeAlias = Literal["left", "right"]

_MOST_TICKS: Final = 2**63 // DENOMINATOR - 1
"""Integrals at later times do not fit an int64."""

GENTLE_EPOCHS: Final = 4
"""Repeating data up to four times is nearly as good as new data (arXiv 2305.16264)."""


@dataclass(frozen=True)
class MixPoint:
    """From tick ``at`` on, sources are drawn in proportion to ``weights`` (a source left out has weight 0).

    ``interpolation`` says how the weights come there from the previous point: at once (``step``) or along a
    straight line of the normalised weights (``linear``).
    """

    at: int
    weights: Mapping[str, float]
    interpolation: Interpolation = "step"

    def __post_init__(self) -> None:
        """Refuse what is no mix: ValueError that begins with the field."""
        if self.interpolation not in get_args(Interpolation):
            raise ValueError(f"interpolation: {self.interpolation!r} is unknown; use step or linear")
        for name, weight in self.weights.items():
            if not 0 <= weight < float("inf"):
                raise ValueError(f"weights.{name}: {weight} is not a weight; use a number of at least 0")
        if not any(self.weights.values()):
            raise ValueError("weights: all are 0; at least one source must be above 0")

    def as_yaml(self, canonical_nodes: int) -> str:
        """As a run's configuration has it."""
        weights = ", ".join(f"{name}: {weight:.9g}" for name, weight in self.weights.items() if weight)
        ramp = ", interpolation: linear" if self.interpolation == "linear" else ""
        return f"{{at: {self.at * canonical_nodes}sp, weights: {{{weights}}}{ramp}}}"

    def shares(self, sources: Sequence[str]) -> Floats:
        """The weights in the order of ``sources``, scaled to sum to 1: [sources]."""
        largest = max(self.weights.values())
        weights = [self.weights.get(name, 0.0) / largest for name in sources]
        return np.array(weights) / math.fsum(weights)


@dataclass(frozen=True)
class _Revision:
    """One version of the schedule's points, in force from tick ``begin``. An edited run has more than one."""

    begin: int
    sources: tuple[str, ...]
    points: tuple[MixPoint, ...]

    def shares(self, tick: float, side: Side = "right") -> Floats:
        """Weights asked for at a tick, or just before it (``side="left"``): [sources], summing to 1."""
        times = [point.at for point in self.points]
        after = int(np.searchsorted(times, tick, side))
        before = self.points[max(after - 1, 0)]
        here = before.shares(self.sources)
        if after == len(self.points) or self.points[after].interpolation == "step" or after == 0:
            return here
        target = self.points[after]
        fraction = (tick - before.at) / (target.at - before.at)
        return here + (target.shares(self.sources) - here) * fraction

    def corners(self) -> Floats:
        """Weights at both ends of every stretch between points: [2 · points, sources]."""
        return np.stack([self.shares(p.at, side) for p in self.points for side in ("left", "right")])

    def pieces(self) -> tuple[Ints, Ints]:
        """Constant pieces from ``begin`` on: their first ticks [pieces], integer weights [pieces, sources].

        A ramp of length L becomes steps of h <= √L / 4 ticks, each with its midpoint's weights. The integral
        is then exact at every step's edge, and within h² / 8L <= 1/128 of a sample between the edges.
        """
        times, shares = [np.zeros(1, np.int64)], [self.points[0].shares(self.sources)[None]]
        for before, point in itertools.pairwise(self.points):
            if point.interpolation == "linear":
                length = point.at - before.at
                edges = np.arange(before.at, point.at, max(1, math.isqrt(length) // 4))
                middles = (edges + np.append(edges[1:], point.at) - 2 * before.at) / (2 * length)
                start, end = before.shares(self.sources), point.shares(self.sources)
                times.append(edges)
                shares.append(start + (end - start) * middles[:, None])
            times.append(np.array([point.at], np.int64))
            shares.append(point.shares(self.sources)[None])
        edges, weights = np.concatenate(times), integer_weights(np.concatenate(shares))
        first = int(np.searchsorted(edges, self.begin, "right")) - 1
        return np.maximum(edges[first:], self.begin), weights[first:]


class MixSchedule:
    """Which source every sample of a run comes from.

    >>> mix = MixSchedule.from_config(
    ...     [{"at": "0tok", "weights": {"web": 0.8, "code": 0.2}},
    ...      {"at": "0.5dur", "weights": {"web": 0.4, "code": 0.6}}],
    ...     Clock.of("100ba", seq_len=2048, global_batch_size=8))
    >>> mix.sources, mix.counts(400).tolist(), mix.counts(800).tolist()
    (('web', 'code'), [320, 80], [480, 320])
    """

    _sets_lengths = False

    def __init__(
        self, points: Sequence[MixPoint], *, sources: Sequence[str] | None = None, canonical_nodes: int = 1
    ) -> None:
        """Check the points, whose ``at`` are ticks; ``sources`` fixes the order (default: as first named).

        Raises ValueError, beginning with the point concerned, if points are missing, out of order or name a
        source that is not among ``sources``.
        """
        if not points or points[0].at != 0:
            raise ValueError("mix: the first point must be at 0tok, where the run begins")
        for i, (before, point) in enumerate(itertools.pairwise(points), 1):
            if point.at <= before.at:
                raise ValueError(
                    f"mix[{i}].at: comes no later than the point before it, in whole samples (a point with "
                    f"seq_len waits for a step to begin); order points by time"
                )
        named = list(dict.fromkeys(name for point in points for name in point.weights))
        names = tuple(named if sources is None else sources)
        for i, point in enumerate(points):
            for name in point.weights:
                if name not in names:
                    raise ValueError(f"mix[{i}].weights.{name}: no such source; use {', '.join(names)}")
        if canonical_nodes < 1:
            raise ValueError(f"canonical_nodes: {canonical_nodes} is too few; use at least 1")
        self._set([_Revision(0, names, tuple(points))], canonical_nodes)

    @classmethod
    def _of(cls, revisions: Sequence[_Revision], canonical_nodes: int) -> MixSchedule:
        schedule = object.__new__(cls)
        schedule._set(revisions, canonical_nodes)
        return schedule

    def _set(self, revisions: Sequence[_Revision], canonical_nodes: int) -> None:
        """Revisions are in order, and each one's sources begin with those of the revision before."""
        self.sources, self.canonical_nodes = revisions[-1].sources, canonical_nodes
        self._revisions = tuple(revisions)
        self._parts: list[Apportionment] = []
        nodes = np.arange(canonical_nodes)
        integral, counts = np.zeros(0, np.int64), np.zeros((canonical_nodes, 0), np.int64)
        for revision in self._revisions:
            if self._parts:
                begin = np.full_like(nodes, revision.begin)
                integral, counts = self._parts[-1].integral(begin[0]), self._parts[-1].counts(begin, nodes)
            new = len(revision.sources) - len(integral)
            integral, counts = np.pad(integral, (0, new)), np.pad(counts, ((0, 0), (0, new)))
            self._parts.append(Apportionment(*revision.pieces(), integral, counts, revision.corners()))

    @classmethod
    def from_config(
        cls,
        points: Iterable[Mapping[str, Any]],
        clock: Clock,
        *,
        sources: Sequence[str] | None = None,
        canonical_nodes: int = 1,
    ) -> MixSchedule:
        """Resolve points ``{at, weights, interpolation, seq_len}``; ``at`` is as in ``dbrx_train.schedule``.

        Times are rounded to whole ticks. A point with a ``seq_len`` begins with the clock's step of that
        length, which has to be there (``Clock.with_seq_len``).
        """
        if (ticks := clock.total_samples // canonical_nodes) > _MOST_TICKS:
            least = -(-clock.total_samples // _MOST_TICKS)
            raise ValueError(
                f"canonical_nodes: {ticks:.3g} samples on each are too many; use at least {least}"
            )
        resolved, sets_lengths = list[MixPoint](), False
        for i, point in enumerate(points):
            field = f"mix[{i}]"
            if unknown := set(point) - {"at", "weights", "interpolation", "seq_len"}:
                raise ValueError(
                    f"{field}.{min(unknown)}: unknown key; a point has at, weights, interpolation and seq_len"
                )
            if missing := {"at", "weights"} - set(point):
                raise ValueError(f"{field}.{min(missing)}: is missing")
            samples, interpolation = (
                clock.samples(point["at"], f"{field}.at"),
                point.get("interpolation", "step"),
            )
            if (seq_len := point.get("seq_len")) is not None:
                step = clock.first_step(point["at"])
                samples, sets_lengths = Fraction(step.sample), True
                if step.seq_len != seq_len:
                    raise ValueError(f"{field}.seq_len: is {seq_len}, but the clock has {step.seq_len} there")
                if interpolation == "linear" and clock.stage(max(0, step.batch - 1), "ba").seq_len != seq_len:
                    raise ValueError(
                        f"{field}.interpolation: no ramp leads to samples of another length (seq_len); "
                        f"use step"
                    )
            try:
                weights = {str(name): float(weight) for name, weight in point["weights"].items()}
                resolved.append(MixPoint(round(samples / canonical_nodes), weights, interpolation))
            except ValueError as error:
                raise ValueError(f"{field}.{error}") from None
        found = cls(resolved, sources=sources, canonical_nodes=canonical_nodes)
        found._sets_lengths = sets_lengths
        return found

    def sample_lengths(self, clock: Clock) -> dict[str, int]:
        """Tokens of a sample of each source that ever has weight: the clock's sequence length while it has.

        Raises ValueError naming a source that has weight at two lengths, or a change of length at which no
        point of the mix stands.
        """
        points = {point.at: point for point in self._revisions[-1].points}
        for before, stage in itertools.pairwise(clock.stages):
            point = points.get(stage.sample // self.canonical_nodes)
            if before.seq_len != stage.seq_len and (point is None or point.interpolation != "step"):
                raise ValueError(
                    f"mix: samples have {stage.seq_len} tokens after {stage.token:,}, but no point steps to "
                    f"sources of that length there"
                )
        lengths = dict[str, int]()
        for at, point in points.items():
            here = clock.stage(at * self.canonical_nodes, "sp").seq_len
            for name in (name for name, weight in point.weights.items() if weight):
                if lengths.setdefault(name, here) != here:
                    raise ValueError(
                        f"mix: {name} has weight where samples have {lengths[name]} tokens and where they "
                        f"have {here} (seq_len); prepare it at both lengths, as two sources"
                    )
        return lengths

    @property
    def moments(self) -> list[int]:
        """The ticks of its points."""
        return [point.at for point in self._revisions[-1].points]

    @property
    def max_deviation(self) -> float:
        """How far a source's samples may be from its weight's integral, in samples per canonical node.

        It bounds a source's count on one canonical node alone, and its total over several divided by their
        number. At most 1 for up to four sources.
        """
        return max(part.max_deviation for part in self._parts)

    def counts(self, tick: ArrayLike, node: ArrayLike = 0) -> Ints:
        """Samples that each source has given on canonical node ``node`` before ``tick``: [..., sources].

        Times and nodes may be arrays; the work is a few binary searches a value, whatever the time.
        """
        ticks, nodes = np.broadcast_arrays(np.asarray(tick, np.int64), np.asarray(node, np.int64))
        assert ticks.size == 0 or 0 <= ticks.min() <= ticks.max() <= _MOST_TICKS
        result = np.zeros((*ticks.shape, len(self.sources)), np.int64)
        version = self._version(ticks, "left")
        for i, part in enumerate(self._parts):
            mine = version == i
            if mine.any():
                result[mine, : len(self._revisions[i].sources)] = part.counts(ticks[mine], nodes[mine])
        return result

    def totals(self, tick: ArrayLike) -> Ints:
        """Samples that each source has given on all canonical nodes before ``tick``: [..., sources]."""
        ticks = np.asarray(tick, np.int64)
        result: Ints = self.counts(ticks[..., None], np.arange(self.canonical_nodes)).sum(-2)
        return result

    def order(self, start: int, stop: int, node: int = 0) -> tuple[Ints, Ints]:
        """The samples of a canonical node at ticks [start, stop): their sources, and their numbers therein.

        A sample's number counts the source's earlier samples on this node since the run began. Both are
        [stop - start].
        """
        counts = self.counts(np.arange(start, stop + 1), node)
        source = np.diff(counts, axis=0).argmax(1)
        return source, counts[np.arange(stop - start), source]

    def expected(self, tick: ArrayLike) -> Floats:
        """The integral of each source's weight, in samples per canonical node: [..., sources]."""
        ticks = np.asarray(tick, np.int64)
        result = np.zeros((*ticks.shape, len(self.sources)))
        version = self._version(ticks, "right")
        for i, part in enumerate(self._parts):
            mine = version == i
            if mine.any():
                result[mine, : len(self._revisions[i].sources)] = part.integral(ticks[mine]) / DENOMINATOR
        return result

    def weights_at(self, tick: float, side: Side = "right") -> dict[str, float]:
        """The weights asked for at ``tick`` (or just before it, from the left), scaled to sum to 1."""
        revision = self._revisions[int(self._version(np.array(tick), side))]
        weights = dict.fromkeys(self.sources, 0.0)
        return weights | dict(zip(revision.sources, revision.shares(tick, side).tolist(), strict=True))

    def repetition(
        self, sizes: Mapping[str, int], stop: int, max_epochs: Mapping[str, float] | None = None
    ) -> dict[str, float]:
        """How many times each source, of ``sizes`` samples, is read before tick ``stop``.

        Warns of a source that is read more than four times and has no limit in ``max_epochs``. Raises
        ValueError naming a source that exceeds its limit, and when.
        """
        epochs = dict[str, float]()
        for source, (name, total) in enumerate(zip(self.sources, self.totals(stop).tolist(), strict=True)):
            times = epochs[name] = total / sizes[name]
            limit = (max_epochs or {}).get(name)
            if limit is None and times > GENTLE_EPOCHS:
                repeated = f"mix: {name} is read {times:.1f} times, and past {GENTLE_EPOCHS} little is gained"
                warnings.warn(f"{repeated} (arXiv 2305.16264)", stacklevel=2)
            elif limit is not None and total > limit * sizes[name]:
                over = self._passes(source, limit * sizes[name], stop)
                raise ValueError(
                    f"sources.{name}.max_epochs: the mix reads it {times:.2f} times, not {limit:g}; it runs "
                    f"out at sample {over * self.canonical_nodes:,}; lower its weight or add data"
                )
        return epochs

    def _passes(self, source: int, total: float, stop: int) -> int:
        """The last tick at which a source has given at most ``total`` samples."""
        ticks = range(stop + 1)
        return bisect.bisect_right(ticks, total, key=lambda tick: int(self.totals(tick)[source])) - 1

    def resume(self, old: MixSchedule, at: int) -> MixSchedule:
        """This schedule for a run that has followed ``old`` up to tick ``at``: its past stays as served.

        Up to ``at`` the answer counts exactly as ``old`` does; from there it goes on from those counts along
        this schedule's points. Its sources are ``old``'s, then the new ones. Raises ValueError, showing the
        first difference, if this schedule asks for another past or leaves out one of its sources.
        """
        if at == 0:
            return self
        self.check_edit(old, at)
        if self._difference(old, at, None, 0.0) is None:
            return old
        sources = tuple(dict.fromkeys(old.sources + self.sources))
        past = [revision for revision in old._revisions if revision.begin < at]
        future = _Revision(at, sources, self._revisions[-1].points)
        return self._of([*past, future], self.canonical_nodes)

    def check_edit(self, old: MixSchedule, at: int) -> None:
        """Raise ValueError, showing the first difference, unless ticks [0, at) are as ``old`` has them."""
        if self.canonical_nodes != old.canonical_nodes:
            raise ValueError(
                f"canonical_nodes: is {self.canonical_nodes}, but the run began with {old.canonical_nodes}"
            )
        for name in old.sources:
            if name not in self.sources:
                raise ValueError(f"sources.{name}: belongs to the run's past; keep it (its weight may be 0)")
        found = self._difference(old, 0, at, 1e-6)
        if found is not None:
            was, now = _show(old.weights_at(*found)), _show(self.weights_at(*found))
            tick, kept = found[0] * self.canonical_nodes, at * self.canonical_nodes
            here = _show(old.weights_at(at, "left"))
            paste = "" if self._sets_lengths else f"; this keeps it: mix: {self._with_past_of(old, at)}"
            raise ValueError(
                f"mix: the past cannot change: at sample {tick:,} it was {was} and is now {now}; edit only "
                f"what follows sample {kept:,} (it was {here} there){paste}"
            )

    def _with_past_of(self, old: MixSchedule, at: int) -> str:
        """Points, as YAML, that are ``old``'s up to tick ``at`` and this schedule's from there."""
        points = list(old._revisions[-1].points)
        past = [point for point in points if point.at < at]
        begin = at
        if len(past) < len(points) and points[len(past)].interpolation == "linear":
            past.append(MixPoint(at, old.weights_at(at, "left"), "linear"))  # where its ramp has come to
            begin = at + 1
        future = [point for point in self._revisions[-1].points if point.at > begin]
        joined = [*past, MixPoint(begin, self.weights_at(begin)), *future]
        return f"[{', '.join(point.as_yaml(self.canonical_nodes) for point in joined)}]"

    def _difference(
        self, old: MixSchedule, begin: int, end: int | None, tolerance: float
    ) -> tuple[int, Side] | None:
        """Where in [begin, end) the weights first differ; they are straight between the points of both."""
        known = {point.at for mix in (self, old) for revision in mix._revisions for point in revision.points}
        known |= {revision.begin for revision in old._revisions}
        inside = [begin, *sorted(t for t in known if begin < t and (end is None or t < end))]
        edges: list[tuple[int, Side]] = [(begin, "right")]
        edges += [(t, side) for t in inside[1:] for side in get_args(Side)]
        edges += [] if end is None else [(end, "left")]
        for tick, side in edges:
            mine, theirs = self.weights_at(tick, side), old.weights_at(tick, side)
            if any(abs(mine.get(k, 0.0) - theirs.get(k, 0.0)) > tolerance for k in mine | theirs):
                return tick, side
        return None

    def _version(self, tick: NDArray[Any], side: Side) -> NDArray[np.intp]:
        """Index of the revision a tick belongs to; ``left`` gives its first tick to the one before."""
        begins = np.array([revision.begin for revision in self._revisions[1:]], np.int64)
        return np.asarray(np.searchsorted(begins, tick, side))

    def to_dict(self) -> dict[str, Any]:
        """Plain scalars, lists and dicts from which ``from_dict`` makes an equal schedule."""
        revisions = [
            {
                "begin": revision.begin,
                "sources": list(revision.sources),
                "points": [
                    {"at": p.at, "weights": dict(p.weights), "interpolation": p.interpolation}
                    for p in revision.points
                ],
            }
            for revision in self._revisions
        ]
        return {"canonical_nodes": self.canonical_nodes, "revisions": revisions}

    @classmethod
    def from_dict(cls, state: Mapping[str, Any]) -> MixSchedule:
        """The schedule that ``to_dict`` described."""
        revisions = [
            _Revision(c["begin"], tuple(c["sources"]), tuple(MixPoint(**point) for point in c["points"]))
            for c in state["revisions"]
        ]
        return cls._of(revisions, state["canonical_nodes"])


def _show(weights: Mapping[str, float]) -> str:
    return ", ".join(f"{name} {weight:.6g}" for name, weight in weights.items() if weight)
