"""What the training data is, as seen by the loss."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from composer import Callback, Logger, State
from composer.utils import dist
from torch import Tensor

from dbrx_train.model.decoder import shift_labels
from dbrx_train.model.loss import IGNORE_INDEX
from dbrx_train.train.intervals import every
from dbrx_train.train.train_state import model_of, outcome_of


class BySource(Callback):  # type: ignore[misc]
    """Logs, every ``interval`` and over all ranks' tokens since the last time,

    - ``loss/source/SOURCE``: the mean cross-entropy of the tokens of each source that was read;
    - ``data/padded_fraction``: which share of the tokens computed were padding.
    """

    def __init__(self, interval: str) -> None:
        self.due = every(interval)
        self.sources: Sequence[str] = ()
        self.batch: Tensor | None = None
        """[2, sources + 1] float64: losses and labels of each source; padded tokens and all tokens."""
        self.sums: Tensor | None = None
        """The same since the last time, of whole batches."""

    def fit_start(self, state: State, logger: Logger) -> None:
        # The data's own order, in which a resumed run's new sources come last
        self.sources = state.train_dataloader.dataset.schedule.sources

    @torch.no_grad()
    def after_forward(self, state: State, logger: Logger) -> None:
        batch, losses = state.batch, state.outputs.token_losses.double()
        documents, mask = batch["document_ids"], model_of(state).config.mask_documents
        labelled = shift_labels(batch["labels"], documents, mask) != IGNORE_INDEX
        per_sample = torch.stack((losses.sum(1), labelled.sum(1).double()))
        numbers = torch.arange(len(self.sources), device=losses.device)
        member = (batch["source"][:, None] == numbers).double()
        padded = (documents < 0).sum().double()
        tokens = torch.full_like(padded, documents.numel())  # no copy from the host, which would wait
        terms = torch.cat((per_sample @ member, torch.stack((padded, tokens))[:, None]), 1)
        self.batch = terms if self.batch is None else self.batch + terms

    def batch_end(self, state: State, logger: Logger) -> None:
        if self.batch is None:
            return
        batch, self.batch = self.batch, None
        if outcome_of(state).taken:  # else its loss may be no number
            self.sums = batch if self.sums is None else self.sums + batch
        if not self.due(state) or self.sums is None:
            return
        sums, self.sums = self.sums, None
        dist.all_reduce(sums)
        (*losses, padded), (*labels, tokens) = sums.tolist()
        metrics = {
            f"loss/source/{name}": loss / count
            for name, loss, count in zip(self.sources, losses, labels, strict=True)
            if count
        }
        logger.log_metrics(metrics | {"data/padded_fraction": padded / tokens})
