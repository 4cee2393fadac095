"""Writes the table in docs/dry-run.md: python scripts/dry_run_docs.py (15 dry runs of one to two minutes)."""

from __future__ import annotations

from pathlib import Path

from dbrx_train.config import ConfigError, RunConfig, load
from dbrx_train.plan.dry_run import DryRun, dry_run, estimated
from dbrx_train.plan.world import check_world, largest_microbatch
from dbrx_train.train.optim import build_optimizer

ROOT = Path(__file__).parent.parent
TARGET = ROOT / "docs" / "dry-run.md"
BEGIN, END = "<!-- scripts/dry_run_docs.py -->\n", "<!-- end -->\n"
NAMES = ["dbrx-9b", "moe-a", "dense-a", "dbrx-18b", "moe-b", "dbrx-35b", "dbrx-73b", "dbrx-132b"]
NAMES += ["dbrx-132b-32k"]
CLUSTERS = (8, 64, 512, 3072)
COLUMNS = ["configuration", "GPUs", "mesh", "skew", "allocated, dry run", "formula", "at"]
COLUMNS += ["reserved, expandable", "formula", "reserved, default"]


def rows(config: RunConfig, clusters: list[int]) -> list[str]:
    """Lines of the table, one for each skew, of clusters on which a rank holds the same."""
    run = dry_run(config, clusters[0], build_optimizer)
    return [_row(config, run, clusters, i) for i in range(len(run.steps))]


def alike(config: RunConfig) -> list[list[int]]:
    """The clusters that the configuration runs on, in groups on which a rank holds the same."""
    groups: dict[bool, list[int]] = {}
    for gpus in CLUSTERS:
        try:
            check_world(config, gpus)
        except ConfigError:
            continue
        groups.setdefault(largest_microbatch(config, gpus).per_step > 1, []).append(gpus)
    return list(groups.values())


def _row(config: RunConfig, run: DryRun, clusters: list[int], step: int) -> str:
    shape, seen = run.shape, run.steps[step]
    expected = estimated(config, run, seen.skew)
    mesh = f"shard {shape.shard}" + (f", experts over {shape.expert}" if shape.expert > 1 else "")
    names = ", ".join(f"{gpus:,}" for gpus in clusters)
    first = [config.run_name, names, mesh] if step == 0 else ["", "", ""]
    return _line(
        [
            *first,
            f"{seen.skew:g}" if shape.expert > 1 else "",
            _gb(seen.peak.allocated),
            f"{_gb(expected.total)} ({expected.total / seen.peak.allocated - 1:+.1%})",
            seen.peak_moment,
            _gb(seen.reserved["expandable"]),
            f"{_gb(expected.reserved)} ({expected.reserved / seen.reserved['expandable'] - 1:+.1%})",
            _gb(seen.reserved["segments"]),
        ]
    )


def _gb(size: int) -> str:
    return f"{size / 1e9:.1f}"


def _line(cells: list[str]) -> str:
    return f"| {' | '.join(cells)} |\n"


def header() -> str:
    return _line(COLUMNS) + _line(["---"] * len(COLUMNS))


def write(table: str) -> None:
    before, rest = TARGET.read_text(encoding="utf-8").split(BEGIN)
    TARGET.write_text(before + BEGIN + table + END + rest.split(END)[1], encoding="utf-8")


def main() -> None:
    lines = []
    for name in NAMES:
        config = load(ROOT / "configs" / "pretrain" / f"{name}.yaml")
        for clusters in alike(config):
            found = rows(config, clusters)
            print("".join(found), end="", flush=True)
            lines += found
    write(header() + "".join(lines))


if __name__ == "__main__":
    main()
