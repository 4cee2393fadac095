"""Dbrx as Composer's Trainer wants it."""

from __future__ import annotations

from typing import Any, Self

import torch
from composer.models import ComposerModel
from torch.distributed.fsdp import FSDPModule
from torchmetrics import MeanMetric, Metric

from dbrx_train.model.decoder import Dbrx, DbrxOutput

Batch = dict[str, torch.Tensor]


class CrossEntropy(MeanMetric):
    """Mean next-token cross-entropy in nats, every loss token counted once; NaN if any batch's is."""

    def __init__(self) -> None:
        super().__init__(nan_strategy="disable")


class Perplexity(CrossEntropy):
    """exp of the mean cross-entropy."""

    def compute(self) -> torch.Tensor:
        return super().compute().exp()


class ComposerDbrx(ComposerModel):  # type: ignore[misc]
    """Wraps ``Dbrx``; batches are those of ``dbrx_train.data.collate``.

    Args:
        model: the decoder, sharded or not.
        cpu_autocast: run in bfloat16 autocast on a CPU, for which Composer itself knows float32 only.
    """

    def __init__(self, model: Dbrx, *, cpu_autocast: bool = False) -> None:
        super().__init__()
        self.model = model
        self.cpu_autocast = cpu_autocast

    def to(self, *args: Any, **kwargs: Any) -> Self:
        """As for any module, but a sharded model stays where it is: its shards may be offloaded."""
        if isinstance(self.model, FSDPModule):
            return self
        moved: Self = super().to(*args, **kwargs)
        return moved

    def forward(self, batch: Batch) -> DbrxOutput:
        with torch.autocast("cpu", dtype=torch.bfloat16, enabled=self.cpu_autocast):
            output: DbrxOutput = self.model(
                batch["input_ids"], labels=batch["labels"], document_ids=batch["document_ids"]
            )
        return output

    def loss(self, outputs: DbrxOutput, batch: Batch) -> dict[str, torch.Tensor]:
        assert outputs.loss is not None
        return {"total": outputs.loss, **outputs.losses}

    def get_metrics(self, is_train: bool) -> dict[str, Metric]:
        return {} if is_train else {"cross_entropy": CrossEntropy(), "perplexity": Perplexity()}

    def update_metric(self, batch: Batch, outputs: DbrxOutput, metric: Metric) -> None:
        assert isinstance(metric, CrossEntropy)
        metric.update(outputs.losses["cross_entropy"], weight=outputs.num_labels)

    def flops_per_batch(self, batch: Batch) -> float:
        """Training FLOPs of a batch by ``DbrxConfig.flops_per_token``; Composer's SpeedMonitor reads this."""
        tokens, seq_len = batch["input_ids"].numel(), batch["input_ids"].shape[1]
        return float(tokens * self.model.config.flops_per_token(seq_len))
