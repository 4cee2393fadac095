"""Held-out metrics: means in which everything that is counted weighs alike, however batches divide it."""

from __future__ import annotations

import torch
from torch import Tensor
from torchmetrics import Metric

__all__ = ["CrossEntropy", "PairMean", "Perplexity"]


class _Mean(Metric):
    """sum / count over all batches and ranks; NaN if a term of the sum is.

    torchmetrics' own ``MeanMetric`` weighs its values, or lets NaN through, but not both (1.7.4).
    """

    total: Tensor
    count: Tensor
    full_state_update = False

    def __init__(self) -> None:
        super().__init__()
        for name in ("total", "count"):
            self.add_state(name, torch.zeros((), dtype=torch.float64), dist_reduce_fx="sum")

    def update(self, total: Tensor, count: Tensor) -> None:
        """Scalars: a sum, and how many terms it has."""
        self.total += total.double()
        self.count += count

    def compute(self) -> Tensor:
        return self.total / self.count


class CrossEntropy(_Mean):
    """Mean next-token cross-entropy in nats, every loss token counted once; NaN if any batch's is."""


class Perplexity(CrossEntropy):
    """exp of the mean cross-entropy."""

    def compute(self) -> Tensor:
        return super().compute().exp()


class PairMean(_Mean):
    """Mean over pairs of one of the terms of ``preference_loss``."""

    def __init__(self, term: str) -> None:
        super().__init__()
        self.term = term
