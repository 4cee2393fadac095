"""What contests have in common: the order of turns, and how a spread is written."""

from __future__ import annotations

import statistics
from collections.abc import Iterator, Sequence
from typing import TypeVar

__all__ = ["in_turn", "spread"]

_Each = TypeVar("_Each")


def in_turn(contestants: Sequence[_Each], rounds: int) -> Iterator[_Each]:
    """Each once a round, in an order that alternates, so that nobody always comes after the same one."""
    for number in range(rounds):
        yield from contestants if number % 2 else reversed(contestants)


def spread(values: Sequence[float], form: str, unit: str = "") -> str:
    """Median unit (least-greatest), each formatted by ``form``."""
    return f"{statistics.median(values):{form}}{unit} ({min(values):{form}}-{max(values):{form}})"
