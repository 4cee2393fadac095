"""What MLflow shows at the head of a run, as Markdown: what it is, and where to look first."""

from __future__ import annotations

from collections.abc import Iterator

from dbrx_train.config import RunConfig
from dbrx_train.plan.table import counted
from dbrx_train.redact import mask

__all__ = ["description"]


def description(config: RunConfig, ranks: int) -> str:
    """Of a run as it was last started, on so many ranks."""
    return mask("\n".join(_lines(config, ranks)))


def _lines(config: RunConfig, ranks: int) -> Iterator[str]:
    model, clock, optimizer = config.model, config.clock, config.optimization.optimizer
    size = f"{counted(model.num_params)} parameters, {counted(model.num_active_params)} active"
    yield f"**{config.run_name}**: {size}; {clock.total_tokens:,} tokens in {clock.total_batches:,} steps."
    yield ""
    last = clock.stages[-1]
    yield (
        f"- a step: {last.global_batch_size:,} samples of {last.seq_len:,} tokens, on {ranks:,} "
        f"rank{'s' if ranks > 1 else ''}"
    )
    yield (
        f"- {optimizer.name}, learning rate {optimizer.lr:g}, {config.optimization.learning_rate.schedule}"
    )
    for point in config.data.mix:
        shares = ", ".join(f"{name} {weight:g}" for name, weight in point.weights.items() if weight)
        yield f"- mix from {point.at} on ({point.interpolation}): {shares}"
    if not config.data.mix:
        yield f"- sources alike: {', '.join(config.data.sources)}"
    if config.init_from.path is not None:
        yield f"- begun from {config.init_from.path}"
    yield ""
    yield (
        "First look: `loss/train/cross_entropy` (or `dpo`), `metrics/eval/SOURCE/cross_entropy`, "
        "`gradients/norm`, `throughput/tokens_per_sec`. Last, where something is odd: `experts/`, `router/`, "
        "`activations/`, a chart for every layer. `dbrx-train report "
        f"{config.folder}` draws all in that order."
    )
