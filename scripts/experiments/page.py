"""Figure and tables of an experiment, drawn from its CSV files into docs/experiments.md."""

from __future__ import annotations

import math
import re
from collections.abc import Sequence
from pathlib import Path

import numpy as np
from results import Finals, Row, bootstrap, differences, factors
from spec import Experiment

ROOT = Path(__file__).resolve().parents[2]
PAGE = ROOT / "docs" / "experiments.md"
IMAGES = ROOT / "docs" / "images"
COLOURS = ("#c05020", "#2060b0", "#208050", "#8040a0", "#606060", "#b09020")


def parts(experiment: Experiment, budget: str, rows: Sequence[Row]) -> str:
    """What stands between the page's markers: nothing but what the rows say."""
    if not any(row.part == "final" for row in rows):
        return f"Not run yet with the budget `{budget}`: `{command(experiment, budget)}`.\n"
    finals = Finals(rows, experiment.measure)
    drawn = f"![{experiment.title}](images/{picture(experiment, budget).name})\n"
    return "\n".join(
        (drawn, *_tables(experiment, finals, rows), f"Made by `{command(experiment, budget)}`.\n")
    )


def command(experiment: Experiment, budget: str) -> str:
    return (
        f"python scripts/experiments train experiments/{experiment.name}.yaml --budget {budget} --work WORK"
    )


def picture(experiment: Experiment, budget: str) -> Path:
    return IMAGES / f"experiment-{experiment.name}-{budget}.svg"


def _tables(experiment: Experiment, finals: Finals, rows: Sequence[Row]) -> list[str]:
    tables = [_losses(experiment, finals, rows)]
    if experiment.frontier:
        tables.append(_factors(experiment, finals))
    tables.append(_grid(rows))
    return tables


def _arms(rows: Sequence[Row]) -> list[str]:
    return list(dict.fromkeys(row.arm for row in rows))


def _losses(experiment: Experiment, finals: Finals, rows: Sequence[Row]) -> str:
    head = ["arm", "parameters (active)", "tokens", "FLOPs", "held-out loss"]
    head += [f"less `{experiment.baseline}`'s, paired by seed", "seeds"]
    head += [f"`{source}`" for source in experiment.watch]
    loads = any(row.metric.startswith("load/") for row in rows) and not experiment.frontier
    head += ["entropy of the load", "largest share", "dead experts"] if loads else []
    lines = []
    for steps in finals.lengths():
        for arm in _arms(rows):
            seeds = finals.seeds([arm], steps)
            if not seeds:
                continue
            own = next(r for r in rows if (r.part, r.arm, r.steps) == ("final", arm, steps))
            last = max(r.tokens for r in rows if (r.part, r.arm, r.steps) == ("final", arm, steps))
            losses = [finals.loss(arm, steps, seed) for seed in seeds]
            spread = f" ± {np.std(losses, ddof=1):.3f}" if len(losses) > 1 else ""
            line = [f"`{arm}`", f"{own.parameters / 1e6:.2f}M ({own.active_parameters / 1e6:.2f}M)"]
            line += [
                f"{last / 1e6:.2f}M",
                f"{own.flops_per_token * last:.2e}",
                f"{np.mean(losses):.3f}{spread}",
            ]
            less = differences(finals, arm, experiment.baseline, steps)
            line += ["" if arm == experiment.baseline else _interval(less, "+.3f"), str(len(seeds))]
            for source in experiment.watch:
                line.append(f"{np.mean([finals.value(arm, steps, s, f'loss/{source}') for s in seeds]):.3f}")
            if loads:
                for metric, form in (("entropy", ".3f"), ("largest", ".2f"), ("dead", ".1%")):
                    value = np.mean([finals.value(arm, steps, s, f"load/{metric}") for s in seeds])
                    line.append("" if math.isnan(value) else format(value, form))
            lines.append(line)
    return _table(head, lines)


def _factors(experiment: Experiment, finals: Finals) -> str:
    lines = []
    for steps in finals.lengths():
        for arm in (arm for arm in finals.arms if arm not in experiment.frontier):
            for equal, by in ((True, "wider, as many tokens"), (False, "wider or trained longer")):
                found = factors(finals, arm, steps, experiment.frontier, equal)
                each = ", ".join(_factor(value) for _, value in sorted(found.items()))
                mean = _geometric(list(found.values())) if found else "dense runs are missing"
                lines.append([f"`{arm}`", f"{steps}", by, each, mean])
    return _table(
        ["arm", "steps", "dense model", "its FLOPs for that loss, by seed", "mean and interval"], lines
    )


def _factor(value: float) -> str:
    return (
        "more than any run's"
        if value == math.inf
        else "less than any run's"
        if value == 0
        else f"{value:.2f}x"
    )


def _geometric(values: Sequence[float]) -> str:
    if not all(0 < value < math.inf for value in values):
        return "outside of what the dense runs span"
    low, high = bootstrap([math.log(value) for value in values])
    shown = f"{math.exp(np.mean(np.log(values))):.2f}x"
    return shown if math.isnan(low) else f"{shown} [{math.exp(low):.2f}, {math.exp(high):.2f}]"


def _interval(values: Sequence[float], form: str) -> str:
    if not values:
        return ""
    low, high = bootstrap(values)
    mean = format(float(np.mean(values)), form)
    return mean if math.isnan(low) else f"{mean} [{low:{form}}, {high:{form}}]"


def _grid(rows: Sequence[Row]) -> str:
    tuning = [row for row in rows if row.part == "tuning" and row.metric.startswith("loss/")]
    rates = sorted({row.lr for row in tuning})
    lines = []
    for arm in dict.fromkeys(row.arm for row in tuning):
        last: dict[float, dict[str, float]] = {}
        for row in tuning:
            if row.arm == arm:
                last.setdefault(row.lr, {})[row.metric] = row.value
        loss = {lr: float(np.mean(list(values.values()))) for lr, values in last.items()}
        best = min(loss, key=loss.__getitem__)
        cells = [f"{loss[lr]:.3f}" if lr in loss else "" for lr in rates]
        bold = [f"**{cell}**" if lr == best else cell for lr, cell in zip(rates, cells, strict=True)]
        lines.append([f"`{arm}`", *bold])
    return _table(["tuning: held-out loss at a learning rate of", *(f"{lr:g}" for lr in rates)], lines)


def _table(head: Sequence[str], lines: Sequence[Sequence[str]]) -> str:
    rows = [head, ["---"] * len(head), *lines]
    return "".join(f"| {' | '.join(row)} |\n" for row in rows)


def renewed(page: str, name: str, content: str) -> str:
    """``page`` with the part of that name renewed. Raises ValueError if it has no such part."""
    mark = f"<!-- scripts/experiments: {name} -->\n"
    pattern = re.compile(re.escape(mark) + ".*?(?=<!-- end -->)", re.DOTALL)
    if not pattern.search(page):
        raise ValueError(f"{PAGE}: has no part {mark.strip()} … <!-- end --> to draw into")
    return pattern.sub(lambda _: mark + "\n" + content + "\n", page)


def draw(experiment: Experiment, budget: str, rows: Sequence[Row], file: Path) -> None:
    """Final losses against FLOPs, each arm a line over its lengths, bars from the best to the worst seed."""
    import matplotlib

    matplotlib.use("svg")
    matplotlib.rcParams.update({"svg.fonttype": "none", "svg.hashsalt": experiment.name, "font.size": 9})
    from matplotlib import pyplot

    finals = Finals(rows, experiment.measure)
    figure, axes = pyplot.subplots(figsize=(5.2, 3.6), layout="constrained")
    single = len(finals.lengths()) == 1
    for place, (arm, colour) in enumerate(zip(_arms(rows), COLOURS * 3, strict=False)):
        x, y, low, high = [], [], [], []
        for steps in finals.lengths():
            points = [finals.point(arm, steps, seed) for seed in finals.seeds([arm], steps)]
            if points:
                losses = [loss for _, loss in points]
                x.append(float(place) if single else points[0][0])
                y.append(float(np.mean(losses)))
                low.append(y[-1] - min(losses))
                high.append(max(losses) - y[-1])
        axes.errorbar(
            x, y, [low, high], marker="o", markersize=4, capsize=3, linewidth=1, color=colour, label=arm
        )
    if single:
        axes.set_xticks(range(len(_arms(rows))), _arms(rows))
    else:
        axes.set(xscale="log", xlabel="training FLOPs")
        axes.legend(frameon=False)
    axes.set(ylabel="held-out loss, nats per token", title=f"{experiment.title} ({budget})")
    file.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(file, metadata={"Date": None, "Creator": None})
    pyplot.close(figure)
