"""A mix over a run, as a table and as a picture, before anything is trained."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

import numpy as np

from dbrx_train.data.mix.schedule import MixSchedule
from dbrx_train.schedule import Clock

__all__ = ["draw", "table"]


def table(mix: MixSchedule, sizes: Mapping[str, int], clock: Clock, rows: int = 10) -> str:
    """What a run has seen, and for each source its weight from there on, its tokens and its epochs so far.

    Evenly spaced moments, and those at which something changes; what was seen is in tokens and in whole
    steps. ``sizes`` are samples per source. A step is given as samples x tokens of each.
    """
    lengths = mix.sample_lengths(clock)
    stages = [stage.sample // mix.canonical_nodes for stage in clock.stages]
    last = clock.total_samples // mix.canonical_nodes
    ticks = sorted({*_ticks(mix, clock, rows + 1), *(t for t in mix.moments + stages if t < last)})
    width = max(34, *(len(name) + 2 for name in mix.sources))
    head = f"{'tokens':>19}{'steps':>11}{'a step':>14}" + "".join(f"{name:>{width}}" for name in mix.sources)
    lines = [head, " " * 44 + f"{'weight           tokens   epochs':>{width}}" * len(mix.sources)]
    for tick in ticks:
        sample = tick * mix.canonical_nodes
        step = clock.stage(sample if tick < last else sample - 1, "sp")
        weights = mix.weights_at(tick, "right" if tick < last else "left")
        cells = []
        for name, total in zip(mix.sources, mix.totals(tick).tolist(), strict=True):
            tokens, epochs = total * lengths.get(name, 0), total / sizes[name]
            cells.append(f"{f'{weights[name]:6.3f} {tokens:16,} {epochs:8.2f}':>{width}}")
        seen = f"{int(clock.convert(sample, 'sp', 'tok')):19,}{int(clock.convert(sample, 'sp', 'ba')):11,}"
        lines.append(f"{seen}{f'{step.global_batch_size} x {step.seq_len}':>14}" + "".join(cells))
    return "\n".join(lines)


def draw(mix: MixSchedule, sizes: Mapping[str, int], clock: Clock, path: Path) -> None:
    """Write a picture (any format of matplotlib's): stacked weights above, epochs per source below."""
    from matplotlib.figure import Figure

    # A step is an edge: the weights just before and just after each moment.
    moments = _ticks(mix, clock, 401)
    tokens = [float(clock.convert(tick * mix.canonical_nodes, "sp", "tok")) for tick in moments]
    sides: list[list[dict[str, float]]] = [[mix.weights_at(t, s) for s in ("left", "right")] for t in moments]
    weights = np.array([[side[name] for both in sides for side in both] for name in mix.sources])
    epochs = mix.totals(moments) / np.array([sizes[name] for name in mix.sources])
    figure = Figure(figsize=(9, 6), layout="constrained")
    above, below = figure.subplots(2, 1, sharex=True)
    above.stackplot(np.repeat(tokens, 2), weights, labels=mix.sources)
    above.set_ylabel("share of the samples")
    above.set_ylim(0, 1)
    above.legend(loc="center left", bbox_to_anchor=(1, 0.5))
    for number, name in enumerate(mix.sources):
        below.plot(tokens, epochs[:, number], label=name)
    below.set_ylabel("epochs")
    below.set_xlabel("tokens seen")
    below.grid(alpha=0.3)
    figure.savefig(path, dpi=110)


def _ticks(mix: MixSchedule, clock: Clock, count: int) -> list[int]:
    """Moments from a run's beginning to its end, evenly spaced in tokens, as the mix counts time."""
    tokens = np.linspace(0, clock.total_tokens, count).round().astype(int).tolist()
    return [round(clock.convert(seen, "tok", "sp") / mix.canonical_nodes) for seen in tokens]
