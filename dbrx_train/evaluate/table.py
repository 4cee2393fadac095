"""A table of results beside chance, by category, as text."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from dbrx_train.evaluate.gauntlet import Gauntlet, Standing
from dbrx_train.evaluate.outcomes import Result

__all__ = ["table"]

_HEAD = ("", "examples", "score", "chance", "rescaled", "bits/byte")


def table(
    results: Mapping[str, Result],
    gauntlet: Gauntlet | None = None,
    standings: tuple[Mapping[str, Standing], Mapping[str, Standing]] = ({}, {}),
) -> str:
    """A line for each task under its category's, the rest after them, and the averages at the end."""
    rows: list[Sequence[str]] = [_HEAD]
    categories, averages = standings
    left = dict(results)
    for category, standing in categories.items():
        rows.append((f"{category}{_partial(standing)}", "", "", "", f"{standing.score:.3f}", ""))
        assert gauntlet is not None
        for name in gauntlet.categories[category]:
            if (found := left.pop(name, None)) is not None:
                base = gauntlet.baselines[name]
                rescaled = gauntlet.rescaled(name, found.score)
                rows.append((f"  {name}", *_figures(found, base), f"{rescaled:.3f}", _bits(found)))
    if left and categories:
        rows.append(("of no category", "", "", "", "", ""))
    indent = "  " if categories else ""
    rows += [
        (f"{indent}{name}", *_figures(found, found.chance), "", _bits(found)) for name, found in left.items()
    ]
    rows += [
        (f"{name}{_partial(standing)}", "", "", "", f"{standing.score:.3f}", "")
        for name, standing in averages.items()
    ]
    wide = [max(len(row[i]) for row in rows) for i in range(len(_HEAD))]
    lines = [
        "  ".join([row[0].ljust(wide[0]), *(c.rjust(w) for c, w in zip(row[1:], wide[1:], strict=True))])
        for row in rows
    ]
    return "\n".join(line.rstrip() for line in lines)


def _figures(result: Result, chance: float) -> tuple[str, str, str]:
    return f"{result.examples:,}", f"{result.score:.3f}", f"{chance:.3f}"


def _bits(result: Result) -> str:
    return "" if result.bits_per_byte is None else f"{result.bits_per_byte:.3f}"


def _partial(standing: Standing) -> str:
    return f" (partial: {len(standing.missing)} missing)" if standing.missing else ""
