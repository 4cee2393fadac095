"""A Gauntlet: scores of tasks brought together in categories, and categories in averages."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml

from dbrx_train.config.errors import nearest
from dbrx_train.evaluate.outcomes import Result

__all__ = ["Gauntlet", "Standing", "read_gauntlet"]

_KEYS = ("weighting", "subtract_random_baseline", "rescale_accuracy", "averages", "categories")
_WEIGHTS = {
    "EQUAL": lambda examples: 1.0,
    "SAMPLE_SZ": lambda examples: max(float(examples), 1.0),
    "LOG_SAMPLE_SZ": lambda examples: max(math.log2(max(examples, 1)), 1.0),
}


@dataclass(frozen=True)
class Standing:
    """Where a model stands in a category, or in an average over some."""

    score: float
    missing: list[str]
    """Benchmarks, or categories, that it lacks: with any, it is partial."""


@dataclass(frozen=True)
class Gauntlet:
    """Categories of benchmarks with what guessing scores, as LLM Foundry's ``eval_gauntlet:`` says."""

    weighting: str
    subtract_random_baseline: bool
    rescale_accuracy: bool
    averages: dict[str, list[str]]
    """Name -> categories."""
    categories: dict[str, dict[str, float]]
    """Name -> benchmark with shots -> its random baseline."""

    @property
    def baselines(self) -> dict[str, float]:
        """Benchmark with shots -> what guessing scores."""
        return {name: base for benchmarks in self.categories.values() for name, base in benchmarks.items()}

    def rescaled(self, name: str, score: float) -> float:
        """(score - baseline) / (1 - baseline): 0 for guessing, 1 for all right."""
        base = self.baselines.get(name, 0.0)
        if not self.subtract_random_baseline:
            return score
        return (score - base) / (1 - base if self.rescale_accuracy else 1)

    def standings(
        self, results: Mapping[str, Result], as_foundry: bool = False
    ) -> tuple[dict[str, Standing], dict[str, Standing]]:
        """Of the categories, and of the averages, ``all`` benchmarks' among them; those without any result
        are left out.

        ``as_foundry``: a category that lacks a benchmark is left out, too, and averages go over the rest.
        """
        categories = {}
        for name, benchmarks in self.categories.items():
            there = [benchmark for benchmark in benchmarks if benchmark in results]
            missing = [benchmark for benchmark in benchmarks if benchmark not in results]
            if there and not (missing and as_foundry):
                categories[name] = Standing(self._mean(there, results), missing)
        averages = {}
        for name, members in self.averages.items():
            scores = [categories[member].score for member in members if member in categories]
            missing = [m for m in members if m not in categories or categories[m].missing]
            if scores:
                averages[name] = Standing(math.fsum(scores) / len(scores), missing)
        everything = [name for name in self.baselines if name in results]
        if everything:
            scores = [self.rescaled(name, results[name].score) for name in everything]
            lacking = [name for name in self.baselines if name not in results]
            averages["all"] = Standing(math.fsum(scores) / len(scores), lacking)
        return categories, averages

    def _mean(self, names: list[str], results: Mapping[str, Result]) -> float:
        weights = [_WEIGHTS[self.weighting](results[name].examples) for name in names]
        scores = [self.rescaled(name, results[name].score) for name in names]
        return math.fsum(w * s for w, s in zip(weights, scores, strict=True)) / math.fsum(weights)


def read_gauntlet(path: Path) -> Gauntlet:
    """The Gauntlet in a file with ``eval_gauntlet:``.

    Raises:
        ValueError: it is no such file, or something in it is wrong; one line that names it.
    """
    try:
        given = yaml.safe_load(path.read_text(encoding="utf-8"))
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        raise ValueError(f"{path}: not valid YAML: {' '.join(str(error).split())}") from None
    tree = given.get("eval_gauntlet") if isinstance(given, dict) else None
    if not isinstance(tree, dict) or not tree.get("categories"):
        raise ValueError(f"{path}: has no categories; must be a mapping with eval_gauntlet:")
    for key in tree:
        if key not in _KEYS:
            raise ValueError(f"{path}: unknown key eval_gauntlet.{key}{nearest(str(key), _KEYS)}")
    weighting = tree.get("weighting", "EQUAL")
    if weighting not in _WEIGHTS:
        raise ValueError(f"{path}: weighting: {weighting!r} is not one of {', '.join(_WEIGHTS)}")
    subtract, rescale = tree.get("subtract_random_baseline", True), tree.get("rescale_accuracy", True)
    if rescale and not subtract:
        raise ValueError(f"{path}: rescale_accuracy: needs subtract_random_baseline")
    try:
        categories = {entry["name"]: _benchmarks(entry["benchmarks"]) for entry in tree["categories"]}
    except (KeyError, TypeError, AttributeError):
        raise ValueError(
            f"{path}: categories: each has a name and benchmarks of name, num_fewshot and random_baseline"
        ) from None
    averages = tree.get("averages") or {"default_average": list(categories)}
    for name, members in averages.items():
        if name in categories or name == "all":
            raise ValueError(f"{path}: averages: {name} is the name of something else")
        for member in members:
            if member not in categories:
                raise ValueError(
                    f"{path}: averages.{name}: no category {member}{nearest(member, categories)}"
                )
    return Gauntlet(weighting, bool(subtract), bool(rescale), averages, categories)


def _benchmarks(entries: list[dict[str, Any]]) -> dict[str, float]:
    found = {
        f"{entry['name']}/{entry['num_fewshot']}-shot": float(entry["random_baseline"]) for entry in entries
    }
    for name, base in found.items():
        if not 0 <= base < 1:
            raise TypeError(name)
    return found
