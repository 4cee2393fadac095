"""A dry run as text: what a rank holds at the peak and at each moment, at each load of its experts."""

from __future__ import annotations

from dbrx_train.config import ConfigError, RunConfig
from dbrx_train.plan.dry_run import BuildOptimizer, DryRun, StepMemory, dry_run, estimated
from dbrx_train.plan.planner import count, kind
from dbrx_train.plan.step_time import RUNTIME

__all__ = ["report_dry_run", "table"]

_SHOWN = 5 * 10**6
"""Bytes that a kind must have somewhere to have a line."""


def report_dry_run(config: RunConfig, build_optimizer: BuildOptimizer) -> None:
    """Print the dry run of ``config`` on the GPUs that its plan is for.

    Raises:
        ConfigError: it is impossible, or does not fit even with evenly loaded experts.
    """
    run, card = dry_run(config, count(config), build_optimizer), kind(config)
    print(table(config, run))
    reserved, room = run.steps[0].reserved["expandable"], card.memory - RUNTIME
    if reserved > room:
        raise ConfigError(
            f"a rank would reserve {_gb(reserved)} GB; tensors can have {room / 1e9:.1f} of a {card.name}; "
            f"dbrx-train plan --search ranks what fits"
        )


def table(config: RunConfig, run: DryRun) -> str:
    """A few lines about the rank, then one for each kind and moment with a column for each skew, in GB."""
    shape, micro, sent = run.shape, run.microbatch, run.sent
    mesh = f"{shape.replicate} x {shape.shard}"
    if shape.expert > 1:
        mesh += f", experts over {shape.expert}"
    rows = [["GB (1e9 bytes)", *(f"skew {step.skew:g}" for step in run.steps)]]
    kinds = {kind: 0 for step in run.steps for kind, size in step.peak.by_kind.items() if size > _SHOWN}
    rows += [[f"  {kind}", *(_gb(step.peak.by_kind.get(kind, 0)) for step in run.steps)] for kind in kinds]
    rows.append(["allocated at the peak", *(_gb(step.peak.allocated) for step in run.steps)])
    rows.append(["  by the formula", *(_gb(estimated(config, run, s.skew).total) for s in run.steps)])
    rows.append(["  which is during", *(step.peak_moment for step in run.steps)])
    rows += [_reserved(run.steps, "expandable", "reserved, expandable segments")]
    rows += [_reserved(run.steps, "segments", "reserved, default segments")]
    rows += [
        [f"peak of {moment}", *(_gb(step.moments[moment].allocated) for step in run.steps)]
        for moment in run.steps[0].moments
    ]
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    lines = [
        (
            f"rank 0 of {shape.replicate * shape.shard:,} ({mesh}); "
            f"{run.microbatches} x {micro.samples} x {micro.seq_len:,} tokens in a step; {run.seconds:.0f} s"
        ),
        (
            f"sends gathered {_gb(sent.gathered)}, scattered {_gb(sent.scattered)}, between replicas "
            f"{_gb(sent.reduced)}, tokens {_gb(sent.exchanged)} GB in that step"
        ),
    ]
    for name, *cells in rows:
        right = (cell.rjust(width) for cell, width in zip(cells, widths[1:], strict=True))
        lines.append("  ".join([name.ljust(widths[0]), *right]))
    return "\n".join(lines)


def _reserved(steps: tuple[StepMemory, ...], kind: str, name: str) -> list[str]:
    return [name, *(_gb(step.reserved[kind]) for step in steps)]


def _gb(size: int) -> str:
    return f"{size / 1e9:.1f}"
