"""A run's picture: loss and expert load over tokens, from what the run logged."""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path

import matplotlib.pyplot as plt
import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from dbrx_train.report.record import OBJECTIVES
from dbrx_train.schedule import Clock
from dbrx_train.train.tracking.mlflow import MLflowStore

_MOST_LAYERS = 8


def held_out_losses(store: MLflowStore) -> dict[str, list[tuple[int, float]]]:
    """Source -> (batch, cross-entropy in nats) of each evaluation, oldest first."""
    prefix, suffix = "metrics/eval/", "/cross_entropy"
    return {
        name.removeprefix(prefix).removesuffix(suffix): store.metric_history(name)
        for name in store.metric_names()
        if name.startswith(prefix) and name.endswith(suffix)
    }


def draw(store: MLflowStore, clock: Clock, path: Path) -> None:
    """Write the picture as PNG: training and held-out loss above, each layer's expert shares below."""
    layers = sorted({n.split("/")[1] for n in store.metric_names() if n.startswith("experts/")})
    layers = layers[:: -(-len(layers) // _MOST_LAYERS) or 1]
    figure = Figure(figsize=(9, 4 + 1.6 * len(layers)), layout="constrained")
    axes = figure.subplots(
        1 + len(layers), 1, sharex=True, squeeze=False, height_ratios=[3] + [1.2] * len(layers)
    )[:, 0]
    _draw_loss(axes[0], store, clock)
    for axis, layer in zip(axes[1:], layers, strict=True):
        _draw_load(axis, store, layer, clock)
    axes[-1].set_xlabel("tokens seen")
    figure.savefig(path, dpi=110)


def _draw_loss(axis: Axes, store: MLflowStore, clock: Clock) -> None:
    for name, label in OBJECTIVES.items():
        if points := store.metric_history(name):
            steps, losses = np.array(points).T
            axis.plot(_tokens(steps + 1, clock), losses, color="0.75", linewidth=0.8, label=label)
    for source, points in held_out_losses(store).items():
        steps, losses = np.array(points).T
        axis.plot(_tokens(steps, clock), losses, marker="o", label=f"held-out {source}")
    axis.set_ylabel("cross-entropy (nats per token)")
    axis.grid(alpha=0.3)
    axis.legend()


def _draw_load(axis: Axes, store: MLflowStore, layer: str, clock: Clock) -> None:
    experts = [n for n in store.metric_names() if n.startswith(f"experts/{layer}/expert")]
    series = [dict(store.metric_history(name)) for name in experts]
    steps = sorted(set.intersection(*map(set, series)))
    shares = np.array([[one[step] for step in steps] for one in series])
    axis.stackplot(_tokens(steps, clock), shares, colors=plt.get_cmap("tab20")(range(20)))
    axis.set_ylim(0, 1)
    axis.set_ylabel(f"{layer}\nexpert share")


def _tokens(steps: Iterable[int], clock: Clock) -> list[float]:
    return [float(clock.convert(int(step), "ba", "tok")) for step in steps]
