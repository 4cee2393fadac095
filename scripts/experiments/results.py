"""An experiment's results as small CSV files, and what they say: differences and factors with intervals."""

from __future__ import annotations

import csv
import itertools
import math
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from typing import Any

import numpy as np
from spec import Budget, Experiment, final_runs, tuning_runs
from training import Workshop, tuned

DEAD = 0.01
"""Of its fair share of tokens: an expert with less is called dead."""
Point = tuple[float, float]
"""FLOPs of a training, and the loss that it came to."""


@dataclass(frozen=True)
class Row:
    """A number of a run: a held-out loss, or the last value of a metric."""

    part: str
    """``tuning`` or ``final``."""
    arm: str
    lr: float
    seed: int
    steps: int
    """How long the run is."""
    flops_per_token: int
    parameters: int
    active_parameters: int
    metric: str
    tokens: int
    """When the number was taken."""
    value: float

    @property
    def flops(self) -> float:
        """Up to then, by ``DbrxConfig.flops_per_token``."""
        return float(self.flops_per_token * self.tokens)


def collect(experiment: Experiment, budget: Budget, shop: Workshop) -> list[Row]:
    """The numbers of all runs that are finished."""
    sources = [*experiment.measure, *experiment.watch]
    rows: list[Row] = []
    for arm in budget.arms:
        for run in tuning_runs(experiment, budget, arm):
            if (found := shop.result(run)) is not None:
                rows += _rows("tuning", arm, found, experiment.measure)
    for run in final_runs(experiment, budget, tuned(experiment, budget, shop)):
        if (found := shop.result(run)) is not None:
            rows += _rows("final", run.arm, found, sources)
    return rows


def _rows(part: str, arm: str, made: Mapping[str, Any], sources: Sequence[str]) -> Iterator[Row]:
    told = (made["lr"], made["seed"], made["steps"], made["flops_per_token"])
    start = (part, arm, *told, made["total_parameters"], made["active_parameters"])
    each = made["tokens_per_step"]
    for source in sources:
        for step, loss in made["curves"][source].items():
            yield Row(*start, f"loss/{source}", int(step) * each, round(loss, 5))
    for name, value in _loads(made["last"]).items():
        yield Row(*start, name, made["steps"] * each, round(value, 5))


def _loads(last: Mapping[str, float]) -> dict[str, float]:
    """How evenly experts are used at the end, over all layers; nothing for a dense model."""
    layers = {name.split("/")[1] for name in last if name.startswith("experts/")}
    shares = [v for n, v in last.items() if n.startswith("experts/") and n.rpartition("/")[2][6:].isdigit()]
    if not layers:
        return {}
    fair = len(layers) / len(shares)
    return {
        "load/entropy": float(np.mean([last[f"experts/{layer}/entropy"] for layer in layers])),
        "load/largest": max(shares) / fair,
        "load/dead": sum(share < DEAD * fair for share in shares) / len(shares),
    }


def write(path: Path, rows: Iterable[Row]) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    with open(path, "w", newline="", encoding="utf-8") as file:
        writer = csv.DictWriter(file, [f.name for f in fields(Row)], lineterminator="\n")
        writer.writeheader()
        writer.writerows(map(asdict, rows))


def load(path: Path) -> list[Row]:
    """Raises ValueError, naming file and line, for what ``write`` did not write."""
    kinds: dict[str, Callable[[str], Any]] = {"str": str, "int": int, "float": float}
    with open(path, newline="", encoding="utf-8") as file:
        reader = csv.DictReader(file)
        rows = []
        for given in reader:
            try:
                rows.append(Row(**{f.name: kinds[str(f.type)](given[f.name]) for f in fields(Row)}))
            except (KeyError, TypeError, ValueError):
                raise ValueError(
                    f"{path}:{reader.line_num}: is no row of {', '.join(f.name for f in fields(Row))}"
                ) from None
    return rows


class Finals:
    """The last numbers of the final runs, by arm, length and seed."""

    def __init__(self, rows: Iterable[Row], measure: Sequence[str]) -> None:
        self.measure = measure
        self._rows = {
            (r.arm, r.steps, r.seed, r.metric): r for r in rows if r.part == "final"
        }  # evaluations are in the order of time: the last one stays

    @property
    def arms(self) -> list[str]:
        return list(dict.fromkeys(arm for arm, *_ in self._rows))

    def lengths(self) -> list[int]:
        return sorted({steps for _, steps, _, _ in self._rows})

    def seeds(self, arms: Sequence[str], steps: int) -> list[int]:
        """Those of which all of ``arms`` are finished."""
        made = [{s for a, n, s, _ in self._rows if (a, n) == (arm, steps)} for arm in arms]
        return sorted(set.intersection(*made)) if made else []

    def loss(self, arm: str, steps: int, seed: int) -> float:
        """Mean over the measured sources, nats per token."""
        return float(np.mean([self.value(arm, steps, seed, f"loss/{source}") for source in self.measure]))

    def value(self, arm: str, steps: int, seed: int, metric: str) -> float:
        found = self._rows.get((arm, steps, seed, metric))
        return math.nan if found is None else found.value

    def point(self, arm: str, steps: int, seed: int) -> Point:
        row = self._rows[arm, steps, seed, f"loss/{self.measure[0]}"]
        return row.flops, self.loss(arm, steps, seed)


def bootstrap(
    values: Sequence[float], statistic: Callable[[Any], Any] = np.mean, level: float = 0.95
) -> Point:
    """The percentile interval of a statistic over all, or over 10,000, resamples of ``values``.

    Up to six values all resamples are made (n^n of them), so that the interval is exact. Efron & Tibshirani,
    An Introduction to the Bootstrap, 1993, chapter 13. With one value there is none: (nan, nan).
    """
    n = len(values)
    if n < 2:
        return math.nan, math.nan
    given = np.array(values)
    if n <= 6:
        drawn = np.array(list(itertools.product(range(n), repeat=n)))
    else:
        drawn = np.random.default_rng(0).integers(n, size=(10_000, n))
    made = statistic(given[drawn], axis=1)
    tail = 100 * (1 - level) / 2
    low, high = np.percentile(made, [tail, 100 - tail])
    return float(low), float(high)


def flops_to_reach(loss: float, points: Sequence[Point]) -> float:
    """The least FLOPs at which ``points`` reach ``loss``, on their lower convex hull.

    Its lines are straight in the logarithm of FLOPs. Infinite where even the best point is worse, and 0 where
    the cheapest is better: beyond the points nothing is guessed.
    """
    hull: list[Point] = []
    for point in sorted((math.log(flops), reached) for flops, reached in points):
        if hull and point[1] >= hull[-1][1]:
            continue
        while len(hull) > 1 and _slope(hull[-2], point) <= _slope(hull[-2], hull[-1]):
            hull.pop()
        hull.append(point)
    if loss > hull[0][1]:
        return 0.0
    for (cheap, worse), (dear, better) in itertools.pairwise(hull):
        if better <= loss:
            return math.exp(cheap + (worse - loss) / (worse - better) * (dear - cheap))
    return math.exp(hull[0][0]) if loss == hull[0][1] else math.inf


def _slope(one: Point, other: Point) -> float:
    return (other[1] - one[1]) / (other[0] - one[0])


def factors(
    finals: Finals, arm: str, steps: int, frontier: Sequence[str], equal_tokens: bool
) -> dict[int, float]:
    """Seed -> how many times the FLOPs of ``arm`` the frontier needs for its loss.

    The frontier's runs are those of the same length, or those of any; the latter only where there is a longer
    one, since the cheapest way to a lower loss may be to train on.
    """
    result = {}
    for seed in finals.seeds([arm], steps):
        made = [(a, n) for a in frontier for n in finals.lengths() if seed in finals.seeds([a], n)]
        if equal_tokens:
            made = [(a, n) for a, n in made if n == steps]
        elif all(n <= steps for _, n in made):
            continue
        if len(made) > 1:
            flops, loss = finals.point(arm, steps, seed)
            result[seed] = flops_to_reach(loss, [finals.point(a, n, seed) for a, n in made]) / flops
    return result


def differences(finals: Finals, arm: str, baseline: str, steps: int) -> list[float]:
    """Loss of ``arm`` less that of the baseline, seed by seed, nats per token."""
    seeds = finals.seeds([arm, baseline], steps)
    return [finals.loss(arm, steps, seed) - finals.loss(baseline, steps, seed) for seed in seeds]
