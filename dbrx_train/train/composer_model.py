"""Dbrx as Composer's Trainer wants it."""

from __future__ import annotations

from typing import Any, Self

import torch
from composer.models import ComposerModel
from torch.distributed.fsdp import FSDPModule
from torchmetrics import Metric

from dbrx_train.data.stream.loader import Batch
from dbrx_train.model.decoder import Dbrx, DbrxOutput
from dbrx_train.train.eval_metrics import CrossEntropy, PairMean, Perplexity
from dbrx_train.train.preferences import TERMS, pairs_present, preference_loss


class ComposerDbrx(ComposerModel):  # type: ignore[misc]
    """Wraps ``Dbrx``; batches are those of ``dbrx_train.data.stream.loader``.

    Args:
        model: the decoder, sharded or not.
        cpu_autocast: run in bfloat16 autocast on a CPU, for which Composer itself knows float32 only.
        beta: of DPO, where batches are of pairs; None for next-token prediction.
    """

    def __init__(self, model: Dbrx, *, cpu_autocast: bool = False, beta: float | None = None) -> None:
        super().__init__()
        self.model = model
        self.cpu_autocast = cpu_autocast
        self.beta = beta

    def to(self, *args: Any, **kwargs: Any) -> Self:
        """As for any module, but a sharded model stays where it is: its shards may be offloaded."""
        if isinstance(self.model, FSDPModule):
            return self
        moved: Self = super().to(*args, **kwargs)
        return moved

    def forward(self, batch: Batch) -> DbrxOutput:
        with torch.autocast("cpu", dtype=torch.bfloat16, enabled=self.cpu_autocast):
            output: DbrxOutput = self.model(
                batch["input_ids"],
                labels=batch["labels"],
                document_ids=batch["document_ids"],
                document_starts=batch["document_starts"],
                return_log_probs=self.beta is not None,
            )
        if self.beta is not None and "reference" in batch:
            assert output.loss is not None
            loss, terms = preference_loss(output, batch, self.beta)
            output.loss = output.loss + loss
            output.losses |= terms
        return output

    def loss(self, outputs: DbrxOutput, batch: Batch) -> dict[str, torch.Tensor]:
        assert outputs.loss is not None
        losses = {"total": outputs.loss, **outputs.losses}
        if self.beta is not None:
            # Composer weighs microbatches by pairs here, which is no mean over tokens; loss/source is.
            del losses["cross_entropy"]
        return losses

    def get_metrics(self, is_train: bool) -> dict[str, Metric]:
        if is_train:
            return {}
        pairs = {} if self.beta is None else {name: PairMean(name) for name in TERMS}
        return {"cross_entropy": CrossEntropy(), "perplexity": Perplexity(), **pairs}

    def update_metric(self, batch: Batch, outputs: DbrxOutput, metric: Metric) -> None:
        if isinstance(metric, PairMean):
            pairs = pairs_present(batch).sum()
            metric.update(outputs.losses[metric.term].double() * pairs, pairs)
            return
        assert isinstance(metric, CrossEntropy)
        assert outputs.token_losses is not None
        assert outputs.num_labels is not None
        metric.update(outputs.token_losses.sum(dtype=torch.float64), outputs.num_labels)

    def flops_per_batch(self, batch: Batch) -> float:
        """Training FLOPs of a batch by ``DbrxConfig.flops_per_token``; Composer's SpeedMonitor reads this.

        Frozen weights get no gradient, which spares 2 FLOPs a parameter; adapters are too small to count.
        """
        config = self.model.config
        tokens, seq_len = batch["input_ids"].numel(), batch["input_ids"].shape[1]
        spared = 0 if self.model.lm_head.weight.requires_grad else 2 * config.num_active_params_non_embedding
        return float(tokens * (config.flops_per_token(seq_len) - spared))
