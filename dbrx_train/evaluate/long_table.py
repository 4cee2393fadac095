"""Scores of the tasks of ``long_context``, by length and position of the answer, as text and as a picture."""

from __future__ import annotations

import math
import re
from collections.abc import Mapping
from pathlib import Path

from dbrx_train.evaluate.long_context import POSITIONS
from dbrx_train.evaluate.outcomes import Result

__all__ = ["by_position", "draw", "position_of", "position_table"]

_NAME = re.compile(rf"(.+)_({'|'.join(POSITIONS)})_(\d+)/\d+-shot")
Grid = dict[str, dict[int, dict[str, float]]]
"""Kind -> tokens -> position -> score."""


def position_of(name: str) -> tuple[str, str, int] | None:
    """Kind, position and tokens of a task that is of this kind, by its name with shots."""
    found = _NAME.fullmatch(name)
    return (found[1], found[2], int(found[3])) if found else None


def by_position(results: Mapping[str, Result]) -> Grid:
    """The results that are of such tasks."""
    grid: Grid = {}
    for name, result in results.items():
        if found := position_of(name):
            kind, position, length = found
            grid.setdefault(kind, {}).setdefault(length, {})[position] = result.score
    return grid


def position_table(grid: Grid) -> str:
    """A block for each kind: a line for each length, and for all together their means."""
    lines = []
    for kind, lengths in grid.items():
        lines.append(f"{kind:<20}" + "".join(f"{position:>8}" for position in (*POSITIONS, "mean")))
        for length, scores in sorted(lengths.items()):
            values = [scores.get(position) for position in POSITIONS]
            lines.append(
                f"{length:>14,} tokens"[-20:].ljust(20) + "".join(map(_cell, [*values, _mean(values)]))
            )
    return "\n".join(lines)


def _mean(values: list[float | None]) -> float | None:
    found = [value for value in values if value is not None]
    return math.fsum(found) / len(found) if found else None


def _cell(value: float | None) -> str:
    return f"{'' if value is None else f'{value:.3f}':>8}"


def draw(grid: Grid, path: Path) -> None:
    """Write a picture (any format of matplotlib's): a field for each length and position, by kind."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(1.5 + 3.2 * len(grid), 3.2), layout="constrained")
    for axes, (kind, lengths) in zip(
        figure.subplots(1, len(grid), squeeze=False)[0], grid.items(), strict=True
    ):
        rows = [[lengths[n].get(position, math.nan) for position in POSITIONS] for n in sorted(lengths)]
        image = axes.imshow(rows, vmin=0, vmax=1, cmap="viridis", aspect="auto")
        axes.set(title=kind, xlabel="third with the answer", ylabel="tokens")
        axes.set_xticks(range(len(POSITIONS)), POSITIONS)
        axes.set_yticks(range(len(lengths)), [f"{n:,}" for n in sorted(lengths)])
        for y, row in enumerate(rows):
            for x, value in enumerate(row):
                axes.text(
                    x, y, f"{value:.2f}", ha="center", va="center", color="white" if value < 0.6 else "black"
                )
    figure.colorbar(image, label="right")
    figure.savefig(path, dpi=110)
