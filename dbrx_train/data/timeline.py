"""A mix over a run, as a table and as a picture, before anything is trained."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

import numpy as np

from dbrx_train.data.mix import MixSchedule

__all__ = ["draw", "table"]


def table(mix: MixSchedule, sizes: Mapping[str, int], ticks: int, seq_len: int, rows: int = 10) -> str:
    """Tokens seen, and for each source its weight, its tokens and its epochs so far, at even intervals.

    ``sizes`` are samples per source, ``ticks`` the run's length (see ``MixSchedule``), ``seq_len`` the
    tokens of a sample.
    """
    width = max(28, *(len(name) + 2 for name in mix.sources))
    head = f"{'tokens':>18}" + "".join(f"{name:>{width}}" for name in mix.sources)
    lines = [head, " " * 18 + f"{'weight     tokens   epochs':>{width}}" * len(mix.sources)]
    for tick in np.linspace(0, ticks, rows + 1).round().astype(int).tolist():
        weights = mix.weights_at(tick, "left" if tick else "right")
        cells = []
        for name, total in zip(mix.sources, mix.totals(tick).tolist(), strict=True):
            epochs = total / sizes[name]
            cells.append(f"{f'{weights[name]:6.3f} {total * seq_len:10.3g} {epochs:8.2f}':>{width}}")
        lines.append(f"{tick * mix.canonical_nodes * seq_len:18,}" + "".join(cells))
    return "\n".join(lines)


def draw(mix: MixSchedule, sizes: Mapping[str, int], ticks: int, seq_len: int, path: Path) -> None:
    """Write a picture (any format of matplotlib's): stacked weights above, epochs per source below."""
    from matplotlib.figure import Figure

    # A step is an edge: the weights just before and just after each moment.
    moments = np.linspace(0, ticks, 401).round().astype(int).tolist()
    edges = [(tick, side) for tick in moments for side in ("left", "right")]
    tokens = np.array([tick for tick, _ in edges]) * mix.canonical_nodes * seq_len
    weights = np.array([[mix.weights_at(t, s)[name] for t, s in edges] for name in mix.sources])  # type: ignore[arg-type]
    epochs = mix.totals(moments) / np.array([sizes[name] for name in mix.sources])
    figure = Figure(figsize=(9, 6), layout="constrained")
    above, below = figure.subplots(2, 1, sharex=True)
    above.stackplot(tokens, weights, labels=mix.sources)
    above.set_ylabel("share of the samples")
    above.set_ylim(0, 1)
    above.legend(loc="center left", bbox_to_anchor=(1, 0.5))
    for number, name in enumerate(mix.sources):
        below.plot(tokens[::2], epochs[:, number], label=name)
    below.set_ylabel("epochs")
    below.set_xlabel("tokens seen")
    below.grid(alpha=0.3)
    figure.savefig(path, dpi=110)
