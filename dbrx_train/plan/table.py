"""A plan as text, and as plain values for JSON."""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from dataclasses import asdict
from typing import Any

from dbrx_train.config import RunConfig
from dbrx_train.plan.adapters import trained
from dbrx_train.plan.planner import Plan
from dbrx_train.plan.search import changes

__all__ = ["as_dict", "counted", "gigabytes", "ranking", "render", "rounded"]

_NAMES = {
    ("gathered", "dense"): "gather dense",
    ("gathered", "experts"): "gather experts",
    ("scattered", "dense"): "scatter dense",
    ("scattered", "experts"): "scatter experts",
    ("reduced", "dense"): "replicas dense",
    ("reduced", "experts"): "replicas experts",
    ("exchanged", "tokens"): "tokens to experts",
}
_SHOWN = 10
_SMALL = 1e-3
"""Seconds of a block's two passes below which the host may not launch kernels as fast as they run."""


def render(plan: Plan, misfit: str | None = None) -> str:
    """The table; ``misfit`` is what to say first of a plan that does not fit."""
    sections = [_head(plan), _memory(plan), _sent(plan), _step(plan), _run(plan), _checkpoints(plan)]
    lines = [line for section in sections for line in (*section, "")]
    return "\n".join([*([f"DOES NOT FIT: {misfit}", ""] if misfit else []), *lines[:-1]])


def ranking(config: RunConfig, found: Sequence[Plan]) -> str:
    """The quickest of the plans that fit, each with what limits it."""
    rows = [
        (
            "step, s",
            "MFU, %",
            "tokens/s/GPU",
            "GB",
            "replicate x shard",
            "expert",
            "innermost",
            "checkpointing",
            "gathered",
            "microbatch",
            "limit",
        )
    ]
    for each in found[:_SHOWN]:
        shape, spread = each.shape, each.config.parallelism
        rows.append(
            (
                f"{each.step.total:.3g}",
                f"{100 * each.mfu(causal=True):.0f}",
                f"{each.tokens_per_second / each.gpus:,.0f}",
                f"{each.held.total / 1e9:.1f}",
                f"{shape.replicate} x {shape.shard}",
                f"{shape.expert}",
                shape.innermost if 1 < shape.expert < shape.shard else "",
                spread.activation_checkpointing,
                "twice" if spread.reshard_after_forward else "once",
                f"{each.microbatch.samples} x {each.microbatch.seq_len}",
                each.limit,
            )
        )
    best = " ".join(changes(config, found[0])) or "as it is"
    title = f"{len(found)} meshes, microbatches and the like fit; the quickest ({best}):"
    return "\n".join([title, *_aligned(rows)])


def as_dict(plan: Plan) -> dict[str, Any]:
    """The plan as plain values, in bytes, seconds and shares."""
    machine, network = plan.config.plan.machine, plan.network
    times, error = plan.step, plan.error
    return {
        "run_name": plan.config.run_name,
        "gpu": plan.gpu.name,
        "gpus": plan.gpus,
        "machine": machine,
        "mesh": asdict(plan.shape),
        "activation_checkpointing": plan.config.parallelism.activation_checkpointing,
        "microbatch": asdict(plan.microbatch),
        "parameters": plan.config.model.num_params,
        "active_parameters": plan.config.model.num_active_params,
        "flops_per_token": plan.config.model.flops_per_token(plan.stage.seq_len),
        "flops_per_token_causal": plan.config.model.flops_per_token(plan.stage.seq_len, causal=True),
        "tokens": plan.config.clock.total_tokens,
        "steps": plan.config.clock.total_batches,
        "fits": plan.fits,
        "memory": {
            "moments": plan.held.memory.moments,
            "peak_moment": plan.held.memory.peak_moment,
            "allocated": plan.held.memory.total,
            "on_host": plan.held.on_host,
            "total": plan.held.total,
            "room": plan.room,
        },
        "sent": [
            {
                "kind": each.kind,
                "what": each.what,
                "ranks": each.ranks,
                "stride": each.stride,
                "nvlink": each.sent - each.over_network(machine),
                "network": each.over_network(machine),
                "seconds": each.way(plan.gpu, machine, network).seconds,
            }
            for each in plan.sent
        ],
        "step": {
            "seconds": times.total,
            "seconds_from": times.total * (1 - error),
            "seconds_to": times.total * (1 + error),
            "seconds_with_perfect_overlap": times.at_best,
            "compute_of_a_microbatch": asdict(times.compute),
            "weights_of_a_microbatch": times.weights,
            "tokens_of_a_microbatch": times.tokens,
            "replicas": times.replicas,
            "optimizer": times.optimizer,
            "exposed": times.exposed,
            "retries": times.retries,
            "limit": plan.limit,
        },
        "mfu": plan.mfu(causal=False),
        "mfu_causal": plan.mfu(causal=True),
        "tokens_per_second": plan.tokens_per_second,
        "error": error,
        "cost": {
            key: None if value is not None and math.isinf(value) else value
            for key, value in asdict(plan.cost).items()
        },
    }


def _head(plan: Plan) -> list[str]:
    config, shape, batch = plan.config, plan.shape, plan.microbatch
    model, clock = config.model, config.clock
    flops = model.flops_per_token(plan.stage.seq_len)
    causal = model.flops_per_token(plan.stage.seq_len, causal=True)
    lines = [
        f"{config.run_name} on {plan.gpus:,} x {plan.gpu.name} in machines of {config.plan.machine}",
        f"  model     {counted(model.num_params)} parameters, {counted(model.num_active_params)} active",
        f"  run       {counted(clock.total_tokens)} tokens in {clock.total_batches:,} steps",
        f"  FLOPs     {flops:.3g} a token ({causal:.3g} causal), {flops * clock.total_tokens:.3g} the run",
        (
            f"  mesh      replicate {shape.replicate} x shard {shape.shard}, experts over {shape.expert}"
            f"{' (shard innermost)' if shape.innermost == 'shard' else ''}; "
            f"{config.precision}, checkpointing {config.parallelism.activation_checkpointing}"
        ),
        (
            f"  batch     {plan.stage.global_batch_size:,} samples of {plan.stage.seq_len:,} tokens = "
            f"{batch.samples:,} in a microbatch x {batch.per_step:,} accumulated x {plan.gpus:,} GPUs"
        ),
    ]
    if config.lora.rank is not None:
        factors = counted(trained(config))
        lines.append(f"  adapters  {factors} parameters train; activations are at most those below")
    return lines


def _memory(plan: Plan) -> list[str]:
    moments = plan.held.memory.moments
    rows = [("memory of a rank, GB", *moments)]
    for kind in plan.held.memory.peak:
        rows.append((f"  {kind}", *(gigabytes(kinds[kind]) for kinds in moments.values())))
    rows.append(("  allocated", *(gigabytes(sum(kinds.values())) for kinds in moments.values())))
    taken = gigabytes(plan.held.total)
    host = f", {gigabytes(plan.held.on_host)} GB on the host" if plan.held.on_host else ""
    free = f"{gigabytes(plan.room)} of {gigabytes(plan.gpu.memory)} GB; CUDA, NCCL and cuBLAS take the rest"
    return [
        *_aligned(rows),
        f"  peak: {plan.held.memory.peak_moment}; with the allocator's slack {taken} GB{host}",
        f"  tensors can have {free}",
    ]


def _sent(plan: Plan) -> list[str]:
    if not plan.sent:
        return ["sent: nothing, on one rank"]
    machine, rows = plan.config.plan.machine, [("sent by a rank in a step, GB", "NVLink", "network", "s", "")]
    for each in plan.sent:
        away, way = each.over_network(machine), each.way(plan.gpu, machine, plan.network)
        over = f"{each.ranks} ranks" + (f", {each.stride} apart" if each.stride > 1 else "")
        on = each.machines(machine)
        over += f", on {on} machines" if on > 1 else ""
        name = f"  {_NAMES[each.kind, each.what]}"
        rows.append(
            (name, gigabytes(each.sent - away), gigabytes(away), f"{way.seconds:.3g}", f"over {over}")
        )
    return _aligned(rows)


def _step(plan: Plan) -> list[str]:
    step, error = plan.step, plan.error
    times, n = step.compute, step.accumulated
    rows = [
        ("  dense products", n * times.dense_products),
        ("  experts' products", n * times.expert_products),
        ("  head and loss", n * times.head),
        ("  attention", n * times.attention),
        ("  elementwise", n * times.elementwise),
        ("  optimizer", step.optimizer),
        ("  communication exposed", step.exposed),
    ]
    if step.retries > 1:
        rows.append(("  allocator, nearly full", step.total * (1 - 1 / step.retries)))
    total, speed = step.total, plan.tokens_per_second
    range_ = f"about {total * (1 - error):.3g} to {total * (1 + error):.3g}"
    mfu = f"MFU {100 * plan.mfu(causal=False):.1f} % ({100 * plan.mfu(causal=True):.1f} % causal)"
    lines = [
        f"step {total:.3g} s ({range_}; with perfect overlap {step.at_best:.3g}); limit: {plan.limit}",
        *_aligned([(name, f"{seconds:.3g}", f"{seconds / total:.0%}") for name, seconds in rows]),
        f"  {mfu}, {rounded(speed)} tokens/s, {rounded(speed / plan.gpus)} a GPU",
    ]
    if step.compute.total / plan.config.model.n_layers < _SMALL:
        lines.append("  so small a step takes longer: launching kernels is left out")
    if plan.held.on_host:
        lines.append("  it takes longer: copies from and to the host, and the optimizer there, are left out")
    return lines


def _run(plan: Plan) -> list[str]:
    cost, error, given = plan.cost, plan.error, plan.config.plan
    if math.isinf(cost.days):
        return ["run: never ends, for it fails more often than it saves; see the best interval"]

    def about(value: float) -> str:
        return f"{rounded(value)} ({rounded(value * (1 - error))} to {rounded(value * (1 + error))})"

    money = f"set plan.gpu_hour_price: no price of {plan.gpu.name} is known"
    if cost.dollars is not None:
        price = given.gpu_hour_price or plan.gpu.hour_price
        money = f"$ {about(cost.dollars)} at $ {price:.2f} a GPU-hour"
    power = f"{given.watts or plan.gpu.watts:,.0f} W a GPU and PUE {given.pue}"
    return [
        f"run, goodput {cost.goodput:.1%}, evaluation left out",
        f"  time      {about(cost.days)} days, {about(cost.gpu_hours)} GPU-hours",
        f"  money     {money}",
        f"  energy    {about(cost.megawatt_hours)} MWh at {power}",
    ]


def _checkpoints(plan: Plan) -> list[str]:
    cost, given = plan.cost, plan.config.plan
    best = f"{_span(cost.best_interval)} ({max(1, round(cost.best_interval / plan.step.total)):,}ba), "
    best += f"which loses {1 - cost.best_goodput:.1%}"
    written = f"written in {_span(cost.write)} at {given.storage:g} GB/s; training waits {_span(cost.stall)}"
    failures = f"{given.failures:g} a GPU and day; {given.restart} to restart"
    host = f"host memory {gigabytes(cost.host_memory)} GB a machine beside its processes"
    return [
        "checkpoints and data",
        f"  size      {gigabytes(cost.checkpoint)} GB, {written}",
        f"  failures  one in {_span(cost.between_failures)}, at {failures}",
        f"  interval  every {_span(cost.interval)} loses {1 - cost.goodput:.1%}; best: {best}",
        f"  data      {cost.read / 1e6:.2g} MB/s a machine, uncompressed; {host}",
    ]


def _aligned(rows: Iterable[Sequence[str]]) -> list[str]:
    """First column to the left, the others but the last text to the right."""
    rows = [tuple(row) for row in rows]
    widths = [max(len(row[i]) if i < len(row) else 0 for row in rows) for i in range(max(map(len, rows)))]
    return [
        "  ".join(
            cell.ljust(width) if i == 0 or cell[:1].isalpha() else cell.rjust(width)
            for i, (cell, width) in enumerate(zip(row, widths, strict=False))
        ).rstrip()
        for row in rows
    ]


def gigabytes(size: float) -> str:
    """In units of 1e9 bytes, with a digit more below one."""
    return f"{size / 1e9:,.1f}" if size >= 1e9 or size == 0 else f"{size / 1e9:.2g}"


def counted(number: int) -> str:
    """A number of parameters or tokens, to four digits."""
    for unit, size in (("T", 1e12), ("B", 1e9), ("M", 1e6)):
        if number >= size:
            return f"{number / size:.4g}{unit}"
    return f"{number:,}"


def rounded(value: float) -> str:
    """To three digits."""
    return f"{value:.3g}" if value < 100 else f"{float(f'{value:.3g}'):,.0f}"


def _span(seconds: float) -> str:
    for unit, size in (("days", 86_400), ("h", 3600), ("min", 60)):
        if seconds >= 2 * size:
            return f"{seconds / size:.3g} {unit}"
    return f"{seconds:.3g} s"
