"""An experiment as data: arms that differ in one thing, seeds, budgets, and what is measured."""

from __future__ import annotations

import hashlib
import json
import math
from collections.abc import Iterator, Mapping
from dataclasses import MISSING, dataclass, field, fields
from pathlib import Path
from typing import Any

import yaml
from omegaconf import OmegaConf

DECAY = 0.2
"""Share of every run, at its end, in which the learning rate falls linearly to 0."""


@dataclass(frozen=True)
class Tuning:
    """The grid that the learning rate of each arm is chosen from, on a seed of its own."""

    lr: list[float]
    steps: int
    seed: int
    more: dict[str, list[float]] = field(default_factory=dict)
    """Arm -> further rates, where the best one lay at the grid's edge."""


@dataclass(frozen=True)
class Budget:
    """Sizes of the runs: ``cpu`` for two cores, ``gpu`` for one card."""

    steps: list[int]
    """Of each arm and seed, ascending: several give several lengths out of one constant learning rate."""
    warmup: int
    tuning: Tuning
    corpus: dict[str, int]
    """``ranks`` of its vocabulary, and ``seq_len``, tokens of a sample."""
    arms: dict[str, dict[str, Any]]
    """Arm -> what it overrides of ``run``."""
    run: dict[str, Any] = field(default_factory=dict)


@dataclass(frozen=True)
class Experiment:
    """What is asked, and the runs that answer it."""

    title: str
    measure: list[str]
    """Held-out sources whose loss is reported."""
    baseline: str
    """The arm that the others are compared with, seed by seed."""
    seeds: list[int]
    run: dict[str, Any]
    """Of a run's YAML, what all arms share."""
    budgets: dict[str, Budget]
    frontier: list[str] = field(default_factory=list)
    """Arms among which the least FLOPs that reach a loss are looked for; none: losses alone are compared."""
    watch: list[str] = field(default_factory=list)
    """Held-out sources whose loss is shown beside it."""
    name: str = ""


@dataclass(frozen=True)
class Run:
    """One training: an arm with a learning rate, a seed and a length."""

    arm: str
    lr: float
    seed: int
    steps: int
    config: dict[str, Any]
    """Its YAML, without name and folder, paths as ``${variables.data}``."""

    @property
    def name(self) -> str:
        """Of arm, length and seed, and a hash of all that decides the result: equal runs are made once."""
        digest = hashlib.sha256(json.dumps(self.config, sort_keys=True).encode()).hexdigest()
        return f"{self.arm}-{self.steps}ba-seed{self.seed}-{digest[:8]}"

    @property
    def stable_steps(self) -> int:
        """Steps before the learning rate falls: up to there a longer run is the same."""
        return self.steps - decay_steps(self.steps)


def decay_steps(steps: int) -> int:
    return max(1, round(DECAY * steps))


def make_run(experiment: Experiment, budget: Budget, arm: str, lr: float, seed: int, steps: int) -> Run:
    """The run of an arm, with the schedule that all arms share."""
    last = {
        "max_duration": f"{steps}ba",
        "seed": seed,
        "data": {"shuffle_seed": seed},
        "optimization": {
            "optimizer": {"lr": lr},
            "learning_rate": {
                "schedule": "wsd",
                "warmup": f"{budget.warmup}ba",
                "decay": f"{decay_steps(steps)}ba",
                "final": 0.0,
            },
        },
        "checkpoints": {"interval": f"{steps - decay_steps(steps)}ba", "keep": 2},
    }
    merged = OmegaConf.merge(experiment.run, budget.run, budget.arms[arm], last)
    config = OmegaConf.to_container(merged, resolve=False)
    assert isinstance(config, dict)
    return Run(arm, lr, seed, steps, {str(key): value for key, value in config.items()})


def tuning_runs(experiment: Experiment, budget: Budget, arm: str) -> list[Run]:
    tuning = budget.tuning
    rates = [*tuning.lr, *tuning.more.get(arm, [])]
    return [make_run(experiment, budget, arm, lr, tuning.seed, tuning.steps) for lr in rates]


def final_runs(experiment: Experiment, budget: Budget, rates: Mapping[str, float]) -> Iterator[Run]:
    """Shortest first: what is there when time is up is then whole for some length."""
    for steps in budget.steps:
        for seed in experiment.seeds:
            for arm in rates:
                yield make_run(experiment, budget, arm, rates[arm], seed, steps)


def read(path: Path) -> Experiment:
    """Read an experiment's YAML. Raises ValueError, naming file and key, for one that is no experiment."""
    try:
        given = yaml.safe_load(path.read_text(encoding="utf-8"))
    except (OSError, UnicodeDecodeError) as error:
        raise ValueError(
            f"{path}: cannot be read ({getattr(error, 'strerror', None) or 'no UTF-8'})"
        ) from None
    except yaml.YAMLError as error:
        raise ValueError(f"{path}: not valid YAML: {' '.join(str(error).split())}") from None
    try:
        top = _keys(given, Experiment, "", but={"name"})
        budgets = {}
        for name, one in _mapping(top["budgets"], "budgets").items():
            where = f"budgets.{name}."
            values = _keys(one, Budget, where)
            values["tuning"] = Tuning(**_keys(values["tuning"], Tuning, f"{where}tuning."))
            budgets[name] = Budget(**values)
        experiment = Experiment(**{**top, "budgets": budgets, "name": path.stem})
        _check(experiment)
    except ValueError as error:
        raise ValueError(f"{path}: {error}") from None
    return experiment


def _keys(given: Any, of: type, where: str, but: frozenset[str] | set[str] = frozenset()) -> dict[str, Any]:
    known = {f.name: f for f in fields(of) if f.name not in but}
    values = _mapping(given, where.rstrip(".") or "an experiment")
    for key in values:
        if key not in known:
            raise ValueError(f"{where}{key}: unknown key; must be one of {', '.join(known)}")
    for key, f in known.items():
        if key not in values and f.default is MISSING and f.default_factory is MISSING:
            raise ValueError(f"{where}{key}: missing")
        kind = str(f.type).split("[")[0]
        wanted = {"list": list, "dict": dict, "str": str, "int": int}.get(kind)
        if key in values and wanted and not isinstance(values[key], wanted):
            raise ValueError(f"{where}{key}: {values[key]!r} is no {f.type}")
    return values


def _mapping(given: Any, where: str) -> dict[str, Any]:
    if not isinstance(given, dict) or not given:
        raise ValueError(f"{where}: must be a mapping of keys")
    return given


def _check(experiment: Experiment) -> None:
    for name, budget in experiment.budgets.items():
        named = {"baseline": [experiment.baseline], "frontier": experiment.frontier}
        named[f"budgets.{name}.tuning.more"] = list(budget.tuning.more)
        for key, arms in named.items():
            for arm in arms:
                if arm not in budget.arms:
                    raise ValueError(
                        f"{key}: {arm} is no arm of budgets.{name}; must be one of {', '.join(budget.arms)}"
                    )
        lengths = [*budget.steps, budget.tuning.steps]
        if not budget.steps or not all(
            isinstance(s, int) and s > budget.warmup + decay_steps(s) for s in lengths
        ):
            raise ValueError(
                f"budgets.{name}.steps: must be whole numbers that leave room for warmup and decay"
            )
        if set(budget.corpus) != {"ranks", "seq_len"}:
            raise ValueError(f"budgets.{name}.corpus: must be ranks and seq_len")
        if budget.steps != sorted(set(budget.steps)):
            raise ValueError(f"budgets.{name}.steps: must ascend")
        if budget.tuning.seed in experiment.seeds:
            raise ValueError(
                f"budgets.{name}.tuning.seed: {budget.tuning.seed} is one of seeds; must be another"
            )
        rates = [*budget.tuning.lr, *(rate for more in budget.tuning.more.values() for rate in more)]
        if not budget.tuning.lr or not all(isinstance(r, float) and 0 < r < math.inf for r in rates):
            raise ValueError(f"budgets.{name}.tuning.lr: must be positive numbers such as 4.0e-3")
