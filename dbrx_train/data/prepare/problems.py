"""Trouble that readers come across, counted."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any

from dbrx_train.data.manifest import Problem
from dbrx_train.data.prepare.records import Place
from dbrx_train.data.prepare.workers import Meter

__all__ = ["ProblemLog", "merge_problems"]

_EXAMPLES = 5
"""Places named for each kind of problem."""


class ProblemLog:
    """The readers' listener: passes progress on, counts problems and keeps the first few places."""

    def __init__(self, meter: Meter) -> None:
        self._meter = meter
        self.problems: dict[str, dict[str, Any]] = {}

    def advance(self, size: int) -> None:
        self._meter.add(size=size)

    def problem(self, kind: str, where: Place) -> None:
        entry = self.problems.setdefault(kind, {"count": 0, "examples": []})
        entry["count"] += 1
        if len(entry["examples"]) < _EXAMPLES:
            entry["examples"].append(where())


def merge_problems(
    parts: Iterable[Mapping[str, Mapping[str, Any]]], duplicates: tuple[str, ...]
) -> dict[str, Problem]:
    """The problems of all parts, and files that were named more than once."""
    merged: dict[str, Problem] = {}
    if duplicates:
        merged["duplicate"] = Problem(len(duplicates), list(duplicates[:_EXAMPLES]))
    for problems in parts:
        for kind, found in problems.items():
            before = merged.get(kind, Problem(0, []))
            examples = (before.examples + found["examples"])[:_EXAMPLES]
            merged[kind] = Problem(before.count + found["count"], examples)
    return merged
