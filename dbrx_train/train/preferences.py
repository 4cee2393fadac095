"""Direct preference optimisation (DPO, arXiv 2305.18290): the loss of a batch of pairs of answers.

In a sample, documents 2p and 2p + 1 are the chosen and the rejected side of pair p. ``reference`` in a batch,
[batch, documents], is what the answers' log-probabilities were under the model that training began with;
NaN where a sample has no such document.
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional as F

from dbrx_train.data.stream.loader import Batch
from dbrx_train.model.decoder import DbrxOutput

TERMS = ("dpo", "reward_margin", "reward_accuracy", "log_prob_chosen", "log_prob_rejected")
"""What ``preference_loss`` reports, means over pairs; 0 where there are none."""


def document_log_probs(log_probs: Tensor, document_ids: Tensor, documents: int) -> Tensor:
    """Sums over each document: log_probs and document_ids [B, S] -> float32 [B, documents]."""
    numbers = torch.arange(documents, device=document_ids.device)
    member = document_ids[:, None] == numbers[:, None]
    # No matrix product, which autocast and TF32 round
    return log_probs.float()[:, None].where(member, 0.0).sum(-1)


def pairs_present(batch: Batch) -> Tensor:
    """Whether a sample has such a pair, [batch, pairs]."""
    present: Tensor = ~batch["reference"][:, ::2].isnan()
    return present


def preference_loss(output: DbrxOutput, batch: Batch, beta: float) -> tuple[Tensor, dict[str, Tensor]]:
    """The mean over pairs of -log sigmoid(beta ((pi_c - ref_c) - (pi_r - ref_r))), and ``TERMS``, detached.

    A reward is beta (pi - ref); the margin is the chosen answer's over the rejected one's, and the accuracy
    how often it is positive.
    """
    assert output.log_probs is not None
    present, reference = pairs_present(batch), batch["reference"].float()
    sums = document_log_probs(output.log_probs, batch["document_ids"], reference.shape[1])
    chosen, rejected = sums[:, ::2][present], sums[:, 1::2][present]
    margin = beta * (chosen - reference[:, ::2][present] - rejected + reference[:, 1::2][present])
    values = (-F.logsigmoid(margin), margin, (margin > 0).float(), chosen, rejected)
    loss, *others = (value.sum() / max(1, len(margin)) for value in values)
    return loss, {name: value.detach() for name, value in zip(TERMS, (loss, *others), strict=True)}
