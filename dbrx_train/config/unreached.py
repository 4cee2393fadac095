"""Schedules that never come to what they are for: each is a line that says what will happen instead."""

from __future__ import annotations

import warnings
from collections.abc import Iterator
from operator import attrgetter
from typing import TYPE_CHECKING

from dbrx_train.config.sections import LearningRateConfig

if TYPE_CHECKING:
    from dbrx_train.config.run import RunConfig

__all__ = ["warn_of_unreached"]

_INTERVALS = {
    "checkpoints.interval": "only its end is saved, and a crash before costs all of it",
    "checkpoints.keep_every": "no checkpoint is kept for good",
    "checkpoints.export.interval": "only its end is exported",
    "logging.interval": "what is logged that often never is",
    "evaluation.interval": "it is evaluated{start} at its end only",
}
"""Intervals, and what happens if they are longer than the run."""


def warn_of_unreached(config: RunConfig) -> None:
    """Warn of what the schedules of a run, which is valid, will not come to."""
    for line in (*_learning_rate(config), *_stages(config), *_intervals(config)):
        warnings.warn(line, stacklevel=1)


def _learning_rate(config: RunConfig) -> Iterator[str]:
    given, clock = config.optimization.learning_rate, config.clock
    total, warmup, key = clock.total_tokens, clock.tokens(given.warmup), "optimization.learning_rate"
    if warmup > total:
        yield (
            f"{key}.warmup: its {warmup:,} tokens are more than the run's {total:,}, so the learning rate "
            f"ends at {total / warmup:.3g} of its peak and never falls"
        )
    elif given.decays_last and (decay := clock.tokens(given.decay)) > total - warmup:
        yield (
            f"{key}.decay: its {decay:,} tokens are more than the {total - warmup:,} that warmup leaves of "
            f"the run's {total:,}; the decay takes these"
        )
    if not given.decays_last and given.decay != LearningRateConfig.decay:
        yield f"{key}.decay: is of wsd and inverse_sqrt; {given.schedule} does not heed it"


def _stages(config: RunConfig) -> Iterator[str]:
    clock = config.clock
    total = clock.total_tokens
    for i, point in enumerate(config.data.mix):
        at = clock.tokens(point.at)
        late = f"data.mix[{i}].at: is at {at:,} tokens, and the run ends at {total:,}"
        if point.interpolation == "linear" and at > total:
            yield f"{late}; the ramp to its weights ends on the way"
        elif point.interpolation == "step" and at >= total:
            yield f"{late}; it is never mixed so"
    for stage in clock.stages:
        if stage.batch >= clock.total_batches:
            yield (
                f"the run ends at {total:,} tokens, before {stage} is ever taken (batch_size_warmup, or "
                f"seq_len in the mix)"
            )


def _intervals(config: RunConfig) -> Iterator[str]:
    clock, evaluation = config.clock, config.evaluation
    start = " before its first step and" if evaluation.at_start else ""
    for key, instead in _INTERVALS.items():
        value = attrgetter(key)(config)
        unused = value is None or (key == "evaluation.interval" and not evaluation.max_samples)
        if not unused and (length := clock.tokens(value)) > clock.total_tokens:
            yield (
                f"{key}: its {length:,} tokens are more than the run's {clock.total_tokens:,}; "
                f"{instead.format(start=start)}"
            )
    if (at := config.profile.at) is not None and clock.first_step(at).batch >= clock.total_batches:
        yield f"profile.at: is at {clock.tokens(at):,} tokens, and the run ends before; nothing is traced"
