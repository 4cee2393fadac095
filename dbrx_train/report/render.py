"""From a run's record to HTML in one piece, which asks nothing of any network."""

from __future__ import annotations

import base64
import math
import re
from collections.abc import Callable, Iterable
from datetime import UTC, datetime
from typing import Any

import numpy as np
from omegaconf import OmegaConf

from dbrx_train import pages
from dbrx_train.config import for_record
from dbrx_train.redact import mask, mask_tree
from dbrx_train.report.record import OBJECTIVES, Record, Series

__all__ = ["render"]

_MOST_POINTS = 500
_MOST_POINTS_EACH = 120  # where there is a curve for every layer
_MOST_MOMENTS = 120
Chart = dict[str, Any]


def render(record: Record) -> str:
    """The page. Secrets are masked once more, events included."""
    charts = _charts(record)
    plots = [chart["plot"] for chart in charts]
    data = {"charts": plots, "moments": _moments(plots), "experts": _experts(record)}
    return pages.render(
        "dbrx_train.report",
        data,
        name=mask(record.config.run_name),
        status=record.status.lower(),
        facts=_facts(record),
        tiles=_tiles(record),
        charts=charts,
        experts=data["experts"],
        events=[_event(event) for event in record.events],
        config=OmegaConf.to_yaml(OmegaConf.create(for_record(record.config))),
        params=sorted(
            (key, mask(value)) for key, value in record.params.items() if key.startswith(("env.", "mfu."))
        ),
    )


def _facts(record: Record) -> list[tuple[str, str]]:
    seen, clock = _tokens_seen(record), record.config.clock
    return [
        ("tokens", f"{seen:,} of {clock.total_tokens:,}"),
        (
            "parameters",
            f"{record.config.model.num_params:,}, {record.config.model.num_active_params:,} active",
        ),
        ("started", _when(record.started)),
        ("ended", "not yet" if record.ended is None else _when(record.ended)),
        ("MLflow run", record.run_id),
    ]


def _tiles(record: Record) -> list[tuple[str, str]]:
    """Label and figure of what a reader wants first: the last value, and a mean where single ones jump."""
    found = [
        (f"{label} loss", _last(record, name, "{:.3f}", _LAST_TENTH)) for name, label in OBJECTIVES.items()
    ]
    for source in record.config.data.sources:
        name = f"metrics/eval/{source}/cross_entropy"
        found.append((f"held-out {source}", _last(record, name, "{:.3f}")))
    measured = "measured" in record.params.get("mfu.peak", "")
    found += [
        ("gradient norm", _last(record, "gradients/norm", "{:.3g}", _LAST_TENTH)),
        ("tokens/s", _last(record, "throughput/tokens_per_sec", "{:,.0f}", _WHOLE)),
        (
            "MFU, relative to a measured matrix product" if measured else "MFU",
            _last(record, "throughput/device/mfu", "{:.1%}", _WHOLE),
        ),
        ("goodput", _last(record, "wall/goodput", "{:.1%}")),
        ("padding", _last(record, "data/padded_fraction", "{:.1%}")),
        ("steps skipped", str(sum(event.get("kind") == "bad_step" for event in record.events))),
    ]
    return [(label, figure) for label, figure in found if figure]


_WHOLE, _LAST_TENTH = (1, "mean"), (10, "mean of the last tenth")
"""What part of the values a mean is of, one in so many, and its name."""


def _last(record: Record, name: str, form: str, mean: tuple[int, str] | None = None) -> str:
    values = [value for value in record.metrics.get(name, {}).values() if math.isfinite(value)]
    if not values or mean is None:
        return form.format(values[-1]) if values else ""
    part = values[-max(1, len(values) // mean[0]) :]
    return f"{form.format(values[-1])} ({mean[1]} {form.format(sum(part) / len(part))})"


def _charts(record: Record) -> list[Chart]:
    sources = list(record.config.data.sources)
    groups = _ending("gradients/", record)
    by_number = {number: layer for name in record.metrics for number, layer in _layer(name)}
    layers = sorted(by_number.items())

    def by_layer(form: str) -> list[tuple[str, str]]:
        return [(str(number), form.format(layer)) for number, layer in layers]

    loss = [(label, name) for name, label in OBJECTIVES.items()]
    loss += [(f"held-out {s}", f"metrics/eval/{s}/cross_entropy") for s in sources]
    parts = [(p.replace("_", " "), f"wall/{p}") for p in ("compute", "data_wait", "checkpoint", "evaluation")]
    mix = [(f"{s} {kind}", f"mix/{s}/{kind}") for s in sources for kind in ("asked", "served")]
    one = _chart(record)
    charts = [
        one("Loss", "nats per token", loss),
        one("Loss by source", "nats per token, training", [(s, f"loss/source/{s}") for s in sources]),
        one("Learning rate", "", [(n.removeprefix("lr/"), n) for n in record.metrics if n.startswith("lr/")]),
        one("Gradient norm", "L2, before clipping", [("all", "gradients/norm")], log=True),
        one("Gradient norm by group", "L2, before clipping", groups, log=True),
        one("Throughput", "tokens per second", [("tokens/s", "throughput/tokens_per_sec")], zero=True),
        one("Where the time went", "share of the wall clock", parts, stacked=True),
        one("Goodput", "useful share of all time so far", [("goodput", "wall/goodput")], zero=True, top=1),
        one(
            "Mix", "share of the tokens; dashed: asked for, solid: served", mix, zero=True, top=1, pairs=True
        ),
        one("In-context tasks", "score", _tasks(record, "score"), zero=True, top=1),
        one("Right answers of in-context tasks", "bits per byte", _tasks(record, "bits_per_byte"), zero=True),
        one("Load entropy by layer", "1: all experts alike", by_layer("experts/{}/entropy"), ramp=True),
        one("Spread of the load by layer", "coefficient of variation", by_layer("experts/{}/cv"), ramp=True),
        one("Router entropy by layer", "of a token; 1: no choice", by_layer("router/{}/entropy"), ramp=True),
        one("Router z by layer", "mean squared logsumexp", by_layer("router/{}/z"), ramp=True),
        one("Largest router logit by layer", "", by_layer("router/{}/max_logit"), ramp=True),
        one(
            "Activations by layer",
            "largest magnitude",
            by_layer("activations/{}/max_abs"),
            ramp=True,
            log=True,
        ),
    ]
    return [chart for chart in charts if chart["plot"]["series"]]


def _tasks(record: Record, figure: str) -> list[tuple[str, str]]:
    """Label and metric of each task of which there is this figure."""
    names = [n for n in record.metrics if n.startswith("tasks/") and n.endswith(f"/{figure}")]
    return [(name.removeprefix("tasks/").removesuffix(f"/{figure}"), name) for name in names]


def _layer(name: str) -> list[tuple[int, str]]:
    """The number and the name of the layer that a metric is of, if it is of one."""
    return [(int(digits), f"layer{digits}") for digits in re.findall(r"/layer(\d+)/", name)]


def _moments(plots: list[dict[str, Any]]) -> list[list[int]]:
    """The x of all series, of which many are alike; in the series their numbers take their place."""
    found: dict[tuple[int, ...], int] = {}
    for series in (series for plot in plots for series in plot["series"]):
        series["x"] = found.setdefault(tuple(series["x"]), len(found))
    return [list(moments) for moments in found]


def _ending(prefix: str, record: Record) -> list[tuple[str, str]]:
    names = [name for name in record.metrics if name.startswith(prefix)]
    return [(name.removeprefix(prefix), name) for name in names if not name.endswith("/norm")]


def _chart(record: Record) -> Callable[..., Chart]:
    def make(title: str, unit: str, named: Iterable[tuple[str, str]], **options: Any) -> Chart:
        found = [(label, record.metrics.get(name, {})) for label, name in named]
        most = _MOST_POINTS_EACH if options.get("ramp") else _MOST_POINTS
        series = [_thinned(record, label, values, most) for label, values in found if values]
        plot = {"title": title, "series": series, **options}
        return {"title": title, "unit": unit, "says": _in_words(series), "plot": plot}

    return make


def _in_words(series: list[dict[str, Any]]) -> str:
    """For those who cannot see the picture."""
    ends = [(s["name"], [v for v in s["y"] if v is not None]) for s in series]
    return "; ".join(f"{name}: from {v[0]:.4g} to {v[-1]:.4g}" for name, v in ends if v)


def _thinned(record: Record, label: str, values: Series, most: int) -> dict[str, Any]:
    """At most so many points, each the mean of its neighbours, with the range that they span."""
    steps, y = np.array(list(values)), np.array(list(values.values()), dtype=float)
    x = _tokens(record, steps)
    y[~np.isfinite(y)] = np.nan
    series: dict[str, Any] = {"name": label}
    if len(x) > most:
        parts = np.array_split(np.arange(len(x)), most)
        if most == _MOST_POINTS:
            series["low"] = _plain([_of(np.nanmin, y[part]) for part in parts])
            series["high"] = _plain([_of(np.nanmax, y[part]) for part in parts])
        x = x[[part[-1] for part in parts]]
        y = np.array([_of(np.nanmean, y[part]) for part in parts])
    return series | {"x": x.tolist(), "y": _plain(y)}


def _of(function: Callable[[Any], Any], values: Any) -> float:
    return float("nan") if np.isnan(values).all() else float(function(values))


def _plain(values: Iterable[float]) -> list[float | None]:
    return [float(f"{value:.5g}") if math.isfinite(value) else None for value in values]


def _tokens(record: Record, steps: Any) -> Any:
    clock = record.config.clock
    return np.array([int(clock.convert(int(step), "ba", "tok")) for step in steps])


def _tokens_seen(record: Record) -> int:
    steps = record.metrics.get("loss/train/total") or {-1: 0.0}
    return int(_tokens(record, [max(steps) + 1])[0])


def _experts(record: Record) -> dict[str, Any] | None:
    """Each expert's share of its layer's tokens relative to an equal one, over time.

    ``cells`` is base64 of a byte each, [moment, layer, expert]: 128 + 32 log2(share / equal share), and 0
    for no token at all.
    """
    names = [n for n in record.metrics if n.startswith("experts/") and n.split("/")[2].startswith("expert")]
    names.sort(key=lambda name: [int(digits) for digits in re.findall(r"\d+", name)])
    steps = sorted(set.intersection(*(set(record.metrics[name]) for name in names))) if names else []
    if not steps:
        return None
    layers = len({name.split("/")[1] for name in names})
    shares = np.array([[record.metrics[name][step] for name in names] for step in steps])
    groups = np.array_split(np.arange(len(steps)), min(len(steps), _MOST_MOMENTS))
    shares = np.stack([shares[group].mean(0) for group in groups]).reshape(len(groups), layers, -1)
    ratio = shares * shares.shape[-1]
    with np.errstate(divide="ignore"):
        cells = np.where(ratio > 0, np.clip(np.round(128 + 32 * np.log2(ratio)), 1, 255), 0)
    return {
        "layers": layers,
        "experts": shares.shape[-1],
        "tokens": _tokens(record, [steps[group[-1]] for group in groups]).tolist(),
        "cells": base64.b64encode(cells.astype(np.uint8).tobytes()).decode(),
    }


def _event(event: dict[str, Any]) -> dict[str, str]:
    known = ("time", "step", "tokens", "kind")
    rest = {key: value for key, value in event.items() if key not in known}
    return {
        "when": _when(event["time"]) if isinstance(event.get("time"), int | float) else "",
        "step": _number(event.get("step")),
        "tokens": _number(event.get("tokens")),
        "kind": str(event.get("kind", "")).replace("_", " "),
        "details": ", ".join(f"{key}: {value}" for key, value in mask_tree(rest).items()),
    }


def _number(value: Any) -> str:
    return f"{value:,}" if isinstance(value, int | float) else ""


def _when(seconds: float) -> str:
    return datetime.fromtimestamp(seconds, UTC).strftime("%Y-%m-%d %H:%M:%S UTC")
