"""Writes the table in docs/dry-run.md: python scripts/dry_run_docs.py (nine dry runs of a minute or two)."""

from __future__ import annotations

from pathlib import Path

from dbrx_train.config import RunConfig, load
from dbrx_train.plan.dry_run import DryRun, dry_run, estimated
from dbrx_train.train.optim import build_optimizer

ROOT = Path(__file__).parent.parent
TARGET = ROOT / "docs" / "dry-run.md"
BEGIN, END = "<!-- scripts/dry_run_docs.py -->\n", "<!-- end -->\n"
SHOWN = {
    "dbrx-9b": 8,
    "moe-a": 8,
    "dense-a": 8,
    "dbrx-18b": 8,
    "moe-b": 64,
    "dbrx-35b": 64,
    "dbrx-73b": 64,
    "dbrx-132b": 3072,
    "dbrx-132b-32k": 512,
}
"""Of each configuration, the GPUs that it is written for. A mesh differs between clusters only by whether
microbatches are accumulated."""
COLUMNS = ["configuration", "GPUs", "mesh", "skew", "allocated, dry run", "formula", "at"]
COLUMNS += ["reserved, expandable", "formula", "reserved, default"]


def rows(config: RunConfig, gpus: int) -> list[str]:
    """Lines of the table, one for each skew."""
    run = dry_run(config, gpus, build_optimizer)
    return [_row(config, run, gpus, i) for i in range(len(run.steps))]


def _row(config: RunConfig, run: DryRun, gpus: int, step: int) -> str:
    shape, seen = run.shape, run.steps[step]
    expected = estimated(config, run, seen.skew)
    mesh = f"shard {shape.shard}" + (f", experts over {shape.expert}" if shape.expert > 1 else "")
    first = [config.run_name, f"{gpus:,}", mesh] if step == 0 else ["", "", ""]
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
    for name, gpus in SHOWN.items():
        found = rows(load(ROOT / "configs" / "pretrain" / f"{name}.yaml"), gpus)
        print("".join(found), end="", flush=True)
        lines += found
    write(header() + "".join(lines))


if __name__ == "__main__":
    main()
