"""Writes the table of meshes in docs/parallelism.md: python scripts/parallelism_docs.py"""

from __future__ import annotations

from pathlib import Path

from dbrx_train.config import ConfigError, RunConfig, load
from dbrx_train.plan.collectives import KINDS
from dbrx_train.plan.planner import plan

ROOT = Path(__file__).parent.parent
TARGET = ROOT / "docs" / "parallelism.md"
BEGIN, END = "<!-- scripts/parallelism_docs.py -->\n", "<!-- end -->\n"
NAMES = ["dbrx-9b", "moe-a", "dense-a", "dbrx-18b", "moe-b", "dbrx-35b", "dbrx-73b", "dbrx-132b"]
NAMES += ["dbrx-132b-32k"]
CLUSTERS = (8, 64, 512, 3072)
COLUMNS = ["configuration", "GPUs", "mesh", "held: shards", "gathered", "activations", "all", "reserved"]
COLUMNS += ["sent: gathered", "scattered", "between replicas", "tokens", "of that over the network"]


def row(config: RunConfig, gpus: int) -> list[str] | None:
    """A line of the table; None where the configuration does not run on so many GPUs."""
    try:
        found = plan(config, gpus)
    except ConfigError:
        return None
    assert found.fits, (config.run_name, gpus)
    mesh = f"{found.shape.replicate} x {found.shape.shard}"
    if found.shape.expert > 1:
        mesh += f", experts over {found.shape.expert}"
    sent = {kind: sum(each.sent for each in found.sent if each.kind == kind) for kind in KINDS}
    away = sum(each.over_network(config.plan.machine) for each in found.sent)
    held = found.held.memory
    sizes = (held.shards, held.gathered, held.activations, held.total, held.reserved, *sent.values(), away)
    return [config.run_name, str(gpus), mesh, *(f"{round(n) / 1e9:,.1f}" for n in sizes)]


def _line(cells: list[str]) -> str:
    return f"| {' | '.join(cells)} |\n"


def render() -> str:
    rows = []
    for name in NAMES:
        config = load(ROOT / "configs" / "pretrain" / f"{name}.yaml")
        rows += [_line(line) for gpus in CLUSTERS if (line := row(config, gpus)) is not None]
    return _line(COLUMNS) + _line(["---"] * len(COLUMNS)) + "".join(rows)


def renewed() -> str:
    """The page with its table as it should be."""
    before, rest = TARGET.read_text(encoding="utf-8").split(BEGIN)
    return before + BEGIN + render() + END + rest.split(END)[1]


if __name__ == "__main__":
    TARGET.write_text(renewed(), encoding="utf-8")
