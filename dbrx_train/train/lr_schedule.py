"""The learning rate as a pure function of tokens seen, so that a resumed run cannot lose its place."""

from __future__ import annotations

import math

from dbrx_train.config import LearningRateConfig
from dbrx_train.schedule import Clock


def learning_rate_factor(config: LearningRateConfig, clock: Clock, tokens: int) -> float:
    """The learning rate of the batch that starts at ``tokens`` tokens seen, relative to the peak.

    Warm-up is linear and ends with its last batch at 1. Then, with x the share of the rest of the run done:

    - ``constant``: 1
    - ``linear``: 1 - (1 - final)·x
    - ``cosine``: final + (1 - final)·(1 + cos πx)/2 (arXiv 1608.03983, one half-period)
    - ``wsd``: 1, and over the last ``decay`` tokens a straight line to ``final`` (arXiv 2404.06395)
    - ``inverse_sqrt``: floor + (1 - floor)/√(1 + t/scale), with t tokens since the warm-up, and over the last
      ``decay`` tokens a straight line from there down to ``final`` (LLM Foundry's
      ``InverseSquareRootWithWarmupScheduler``)
    """
    warmup = clock.tokens(config.warmup)
    if tokens < warmup:
        return min(1.0, (tokens + clock.stage(tokens, "tok").tokens_per_batch) / warmup)
    if config.schedule == "constant":
        return 1.0
    start, peak = warmup, 1.0
    if config.decays_last:
        start = max(warmup, clock.before_end(config.decay))
    if config.schedule == "inverse_sqrt":
        scale = clock.tokens(config.scale or config.warmup)
        peak = config.floor + (1 - config.floor) / math.sqrt(1 + (min(tokens, start) - warmup) / scale)
    done = min(1.0, max(0.0, (tokens - start) / max(1, clock.total_tokens - start)))
    left = (1 + math.cos(math.pi * done)) / 2 if config.schedule == "cosine" else 1 - done
    final = min(config.final, peak)
    return final + (peak - final) * left
