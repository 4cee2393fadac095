"""Next-token cross-entropy without ever holding the logits of all tokens.

The loss head computes, for one chunk of tokens at a time, logits, loss and at once the gradients with
respect to the hidden states and the head's weight (the idea of Liger Kernel, arXiv 2410.10989): memory is
[chunk, vocab] instead of [tokens, vocab], and the backward pass recomputes nothing.

Shape suffixes: T tokens, D d_model, V vocabulary.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.autograd.function import once_differentiable

from dbrx_train.model.precision import compute_dtype

IGNORE_INDEX = -100


class HeadLoss(NamedTuple):
    """Means over the real labels, float32 scalars; all 0 where there is no label."""

    total: Tensor
    """cross_entropy + z_weight * z; the only one that carries a gradient."""
    cross_entropy: Tensor
    z: Tensor
    """logsumexp(logits)^2, the z-loss of PaLM (arXiv 2204.02311)."""
    num_labels: Tensor
    """int64 scalar."""


class LMHead(nn.Linear):
    """The output projection: logits, or the loss over labels in chunks of tokens."""

    def __init__(self, d_model: int, vocab_size: int, chunk_size: int, z_weight: float = 0.0) -> None:
        super().__init__(d_model, vocab_size, bias=False)
        self.chunk_size = chunk_size
        self.z_weight = z_weight

    def forward(self, hidden: Tensor, labels: Tensor | None = None) -> Tensor | HeadLoss:  # type: ignore[override]
        """hidden [..., D] -> logits [..., V]; with labels [...] (shifted already, -100 ignored), the loss."""
        if labels is None:
            return super().forward(hidden)
        return chunked_cross_entropy(
            hidden.reshape(-1, hidden.shape[-1]),
            self.weight,
            labels.flatten().long(),
            self.chunk_size,
            self.z_weight,
        )


def chunked_cross_entropy(
    hidden_TD: Tensor, weight_VD: Tensor, labels_T: Tensor, chunk_size: int, z_weight: float = 0.0
) -> HeadLoss:
    """Mean cross-entropy of `hidden @ weight.T` against labels, `chunk_size` tokens at a time.

    Products run in autocast's dtype where it is on, else in hidden's; the softmax is float32.
    """
    wants_grad = torch.is_grad_enabled()
    terms = _ChunkedCrossEntropy.apply(  # type: ignore[no-untyped-call]
        hidden_TD, weight_VD, labels_T, chunk_size, z_weight, wants_grad
    )
    return HeadLoss(*terms)


class _ChunkedCrossEntropy(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        hidden_TD: Tensor,
        weight_VD: Tensor,
        labels_T: Tensor,
        chunk_size: int,
        z_weight: float,
        wants_grad: bool,
    ) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        dtype = compute_dtype(hidden_TD)
        hidden, weight = hidden_TD.to(dtype), weight_VD.to(dtype)
        num_labels = (labels_T != IGNORE_INDEX).sum()
        sums = torch.zeros(2, dtype=torch.float32, device=hidden.device)
        # float32, since it adds up many chunks
        grad_weight = (
            torch.zeros_like(weight, dtype=torch.float32) if wants_grad and ctx.needs_input_grad[1] else None
        )
        grad_hidden = torch.empty_like(hidden_TD) if wants_grad and ctx.needs_input_grad[0] else None
        with torch.autocast(hidden.device.type, enabled=False):
            for start in range(0, labels_T.shape[0], chunk_size):
                chunk = slice(start, start + chunk_size)
                logits = (hidden[chunk] @ weight.T).float()
                terms, logsumexp = _chunk_loss(logits, labels_T[chunk])
                sums += terms
                if grad_weight is None and grad_hidden is None:
                    continue
                grad = _chunk_grad_(logits, logsumexp, labels_T[chunk], num_labels, z_weight).to(dtype)
                if grad_hidden is not None:
                    grad_hidden[chunk] = grad @ weight
                if grad_weight is not None:
                    grad_weight += grad.T @ hidden[chunk]
        ctx.save_for_backward(grad_hidden, grad_weight)
        ctx.weight_dtype = weight_VD.dtype
        cross_entropy, z = sums / num_labels.clamp(min=1)
        total = cross_entropy + z_weight * z
        ctx.mark_non_differentiable(cross_entropy, z, num_labels)
        return total, cross_entropy, z, num_labels

    @staticmethod
    @once_differentiable  # type: ignore[untyped-decorator]
    def backward(ctx: Any, grad_total: Tensor, *_: Tensor) -> tuple[Tensor | None, ...]:
        grad_hidden, grad_weight = ctx.saved_tensors
        if grad_hidden is not None:
            grad_hidden = grad_hidden * grad_total
        if grad_weight is not None:
            grad_weight = (grad_weight * grad_total).to(ctx.weight_dtype)
        return grad_hidden, grad_weight, None, None, None, None


def _chunk_loss(logits: Tensor, labels: Tensor) -> tuple[Tensor, Tensor]:
    """Sums over the chunk of (cross-entropy, logsumexp^2), [2]; and every token's logsumexp, [T]."""
    real = labels != IGNORE_INDEX
    logsumexp = logits.logsumexp(-1)
    label_logits = logits.gather(-1, labels.clamp(min=0)[:, None]).squeeze(-1)
    terms = torch.stack((logsumexp - label_logits, logsumexp.square()))
    return terms.where(real, 0.0).sum(-1), logsumexp


def _chunk_grad_(
    logits: Tensor, logsumexp: Tensor, labels: Tensor, num_labels: Tensor, z_weight: float
) -> Tensor:
    """Gradient of the mean loss with respect to the chunk's logits, written over them.

    d CE = softmax - onehot; d logsumexp^2 = 2 * logsumexp * softmax.
    """
    scale = (labels != IGNORE_INDEX) / num_labels.clamp(min=1)
    probs = logits.sub_(logsumexp[:, None]).exp_()
    grad = probs.mul_(((1 + 2 * z_weight * logsumexp) * scale)[:, None])
    return grad.scatter_add_(-1, labels.clamp(min=0)[:, None], -scale[:, None])
