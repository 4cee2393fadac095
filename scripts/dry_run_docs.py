"""Writes the table in docs/dry-run.md: python scripts/dry_run_docs.py (a minute a line, 1 GB)."""

from __future__ import annotations

from pathlib import Path

from dbrx_train.config import RunConfig, load
from dbrx_train.plan.dry_run import DryRun, dry_run, estimated
from dbrx_train.train.optim import build_optimizer

ROOT = Path(__file__).parent.parent
TARGET = ROOT / "docs" / "dry-run.md"
BEGIN, END = "<!-- scripts/dry_run_docs.py -->\n", "<!-- end -->\n"
NAMES = ["dbrx-9b", "moe-a", "dense-a", "dbrx-18b", "moe-b", "dbrx-35b", "dbrx-73b", "dbrx-132b"]
NAMES += ["dbrx-132b-32k"]
CLUSTERS = (8, 64, 512, 3072)
COLUMNS = ["configuration", "GPUs", "mesh", "skew", "allocated, dry run", "formula", "at"]
COLUMNS += ["reserved, expandable", "formula", "reserved, default"]


def rows(config: RunConfig, gpus: int) -> list[str]:
    """Lines of the table, one for each skew; none where the configuration does not run on so many GPUs."""
    try:
        run = dry_run(config, gpus, build_optimizer)
    except ValueError:
        return []
    return [_row(config, run, i) for i in range(len(run.steps))]


def _row(config: RunConfig, run: DryRun, step: int) -> str:
    shape, seen = run.shape, run.steps[step]
    expected = estimated(config, run, seen.skew)
    mesh = f"{shape.replicate} x {shape.shard}"
    if shape.expert > 1:
        mesh += f", experts over {shape.expert}"
    first = [config.run_name, str(shape.replicate * shape.shard), mesh] if step == 0 else ["", "", ""]
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
        for gpus in CLUSTERS:
            found = rows(config, gpus)
            print("".join(found), end="", flush=True)
            lines += found
    write(header() + "".join(lines))


if __name__ == "__main__":
    main()
