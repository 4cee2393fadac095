"""Renews the tables of docs/planning.md: python scripts/planning_docs.py [--picture]

--picture draws docs/images/planning.svg anew, too.
"""

from __future__ import annotations

import re
import statistics
import sys
from collections.abc import Iterator
from pathlib import Path

import plan_calibration as calibration
import plan_published_moe as moe

from dbrx_train.config import ConfigError, RunConfig, load
from dbrx_train.plan.planner import Plan, count, plan
from dbrx_train.plan.table import render, rounded

ROOT = Path(__file__).parent.parent
TARGET, PICTURE = ROOT / "docs" / "planning.md", ROOT / "docs" / "images" / "planning.svg"
CLUSTERS = (8, 64, 512, 3072)
SHOWN = "configs/pretrain/dbrx-132b.yaml"

_SHARD, _FULL = "parallelism.shard=", "parallelism.activation_checkpointing=full"
_PLAIN = [f"{_SHARD}64", "parallelism.expert=8", "parallelism.innermost=expert", _FULL]
_HALVED, _FLOAT = "parallelism.reduce_dtype=bfloat16", "parallelism.reduce_dtype=float32"
_INNER = "parallelism.innermost=shard"
_SIX = [f"{_SHARD}256", "parallelism.expert=2", "parallelism.innermost=expert", _FULL]
_SIX += ["optimization.microbatch_size=6"]
STEPS = [
    ("dbrx-132b", 3072, "shard 64, experts over 8, `full`", [*_PLAIN, _FLOAT]),
    ("dbrx-132b", 3072, "+ `reduce_dtype: bfloat16`", [*_PLAIN, _HALVED]),
    ("dbrx-132b", 3072, "+ `innermost: shard`", [*_PLAIN, _INNER]),
    ("dbrx-132b", 3072, "+ experts over 16", [*_PLAIN, _INNER, "parallelism.expert=16"]),
    (
        "dbrx-132b",
        3072,
        "+ `full_keep_dispatched`",
        [*_PLAIN, _INNER, "parallelism.expert=16", f"{_FULL}_keep_dispatched"],
    ),
    (
        "dbrx-132b",
        3072,
        "+ shard 128, `reshard_after_forward: false`",
        [
            f"{_SHARD}128",
            "parallelism.expert=16",
            f"{_FULL}_keep_dispatched",
            "parallelism.reshard_after_forward=false",
        ],
    ),
    ("dbrx-132b", 3072, "shard 512, `norm_attn_norm` (as configured)", []),
    (
        "dbrx-132b",
        3072,
        "the same with shard 384, moments in bfloat16",
        [f"{_SHARD}384", "optimization.optimizer.state_dtype=bfloat16"],
    ),
    ("dbrx-132b", 512, "shard 64, experts over 8, `full`", [*_PLAIN, _FLOAT]),
    ("dbrx-132b", 512, "+ `reduce_dtype: bfloat16`", [*_PLAIN, _HALVED]),
    ("dbrx-132b", 512, "+ 3 samples a microbatch", [*_PLAIN, "optimization.microbatch_size=3"]),
    ("dbrx-132b", 512, "+ 6, shard 256, experts over 2 (as its comment says)", _SIX),
    ("dbrx-132b-32k", 512, "dbrx-132b-32k as configured", []),
]
"""Configuration, GPUs, what to call it, and overrides."""


def table(head: str, rows: Iterator[list[str]]) -> str:
    columns = head.split(" | ")
    return "\n".join(f"| {' | '.join(row)} |" for row in [columns, ["---"] * len(columns), *rows]) + "\n"


def errors() -> Iterator[list[str]]:
    """Of the published dense runs, by GPU and how many."""
    rows = calibration.read([calibration.VISIBLE])
    found = list(zip(rows, calibration.errors(rows), strict=True))
    for name in sorted({row.gpu.name for row in rows}):
        for one, label in ((True, "one machine"), (False, "several")):
            sizes = [abs(e) for row, e in found if row.gpu.name == name and (row.gpus <= 8) == one]
            if sizes:
                spread = f"{statistics.median(sizes):.1%}", f"{max(sizes):.1%}"
                yield [name, label, str(len(sizes)), *spread]
    sizes = [abs(e) for _, e in found]
    yield ["all", "", str(len(sizes)), f"{statistics.median(sizes):.1%}", f"{max(sizes):.1%}"]


def mixtures() -> Iterator[list[str]]:
    for name, measured in moe.published().items():
        predicted = moe.tflops(moe.MODELS[name])
        yield [name, f"{measured:.0f}", f"{predicted:.0f}", f"{predicted / measured - 1:+.0%}"]


def plans() -> Iterator[list[str]]:
    """Every configuration on the cluster that it is for, and those of pretraining on all that divide."""
    for path in sorted((ROOT / "configs").rglob("*.yaml")):
        if path.parent.name == "curate":  # a recipe for data
            continue
        config = load(path)
        clusters = CLUSTERS if path.parent.name == "pretrain" else (count(config),)
        yield from (row(config, found) for gpus in clusters if (found := planned(config, gpus)) is not None)


def planned(config: RunConfig, gpus: int) -> Plan | None:
    """None where the configuration does not divide over so many."""
    try:
        return plan(config, gpus)
    except ConfigError:
        return None


def row(config: RunConfig, found: Plan) -> list[str]:
    shape = f"{found.shape.replicate} x {found.shape.shard}"
    shape += f", experts over {found.shape.expert}" if found.shape.expert > 1 else ""
    holds = f"{found.held.total / 1e9:.1f}" if found.fits else f"**{found.held.total / 1e9:.1f}**"
    cells = [config.run_name, f"{found.gpus:,}", shape, holds, f"{found.step.total:.3g}"]
    cells += [f"{100 * found.mfu(causal=False):.0f}", found.limit, rounded(found.cost.days)]
    dollars = found.cost.dollars
    assert dollars is not None
    return [*cells, rounded(dollars) if dollars >= 1 else "under 1"]


def steps() -> Iterator[list[str]]:
    """How the mesh of dbrx-132b came about."""
    for name, gpus, label, options in STEPS:
        found = plan(load(ROOT / f"configs/pretrain/{name}.yaml", options), gpus)
        machine, network = found.config.plan.machine, found.network
        ways = [(each, each.way(found.gpu, machine, network)) for each in found.sent]
        slow = sum(way.seconds for _, way in ways if way.slower == "network")
        away = sum(each.over_network(machine) for each, _ in ways)
        computing, step = found.step.accumulated * found.step.compute.total, found.step
        yield [
            label,
            f"{gpus:,}",
            f"{found.held.total / 1e9:.1f}",
            f"{away / 1e9:.0f}",
            f"{computing:.2f}",
            f"{slow:.2f}",
            f"{slow / computing:.2f}",
            f"{step.total:.2f}",
            f"{100 * found.mfu(causal=False):.0f}",
            f"{100 * found.mfu(causal=False) * step.total / step.at_best:.0f}",
        ]


def example() -> str:
    config = load(ROOT / SHOWN)
    return f"```\n$ dbrx-train plan {SHOWN} --gpus 3072\n{render(plan(config, 3072))}\n```\n"


def parts() -> dict[str, str]:
    return {
        "example": example(),
        "steps": table(
            "dbrx-132b, H100s | GPUs | GB a rank | GB over the network | computing, s | network, s | ratio | "
            "step, s | MFU, % | with perfect overlap",
            steps(),
        ),
        "errors": table("GPU | GPUs | runs | median error | worst", errors()),
        "mixtures": table("model | published, TFLOP/s a GPU | predicted | error", mixtures()),
        "plans": table(
            "configuration | GPUs | mesh | GB a rank | step, s | MFU, % | limit | days | dollars", plans()
        ),
    }


def renewed() -> str:
    """The page with its generated parts as they should be."""
    text = TARGET.read_text(encoding="utf-8")
    for name, content in parts().items():
        mark = f"<!-- scripts/planning_docs.py: {name} -->\n"
        pattern = re.compile(re.escape(mark) + ".*?(?=<!-- end -->)", re.DOTALL)
        assert pattern.search(text), name
        text = pattern.sub(lambda _, new=mark + content: new, text)
    return text


def draw() -> None:
    """Predicted against measured tokens/s, each run a point."""
    import matplotlib

    matplotlib.use("svg")
    matplotlib.rcParams.update({"svg.fonttype": "none", "svg.hashsalt": "planning", "font.size": 9})
    from matplotlib import pyplot

    rows = calibration.read([calibration.VISIBLE])
    figure, axes = pyplot.subplots(figsize=(5.2, 4.6), layout="constrained")
    ends = [4e2, 3e5]
    axes.fill_between(ends, [x * 0.75 for x in ends], [x * 1.25 for x in ends], color="#eeeeee", label="25 %")
    axes.plot(ends, ends, color="#888888", linewidth=0.8)
    for name, several, marker, colour in (
        ("a100-80gb", False, "o", "#c05020"),
        ("h100", False, "o", "#2060b0"),
        ("h100", True, "^", "#2060b0"),
    ):
        chosen = [row for row in rows if row.gpu.name == name and (row.gpus > 8) == several]
        label = f"{name}, {'16 to 512 GPUs' if several else '8 GPUs'}"
        points = [row.measured for row in chosen], [row.predicted() for row in chosen]
        axes.scatter(*points, s=14, marker=marker, color=colour, alpha=0.7, linewidths=0, label=label)
    axes.set(xscale="log", yscale="log", xlim=ends, ylim=ends)
    axes.set(xlabel="measured, tokens/s a GPU", ylabel="predicted, tokens/s a GPU")
    axes.legend(frameon=False)
    figure.savefig(PICTURE, metadata={"Date": None, "Creator": None})


if __name__ == "__main__":
    TARGET.write_text(renewed(), encoding="utf-8")
    if "--picture" in sys.argv:
        draw()
