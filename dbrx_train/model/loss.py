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
        real_T = labels_T != IGNORE_INDEX
        num_labels = real_T.sum()
        scale_T = real_T / num_labels.clamp(min=1)
        sums = hidden.new_zeros(2, dtype=torch.float32)
        wants_hidden = wants_grad and ctx.needs_input_grad[0]
        wants_weight = wants_grad and ctx.needs_input_grad[1]
        # float32, since it adds up many chunks
        grad_weight = torch.zeros_like(weight, dtype=torch.float32) if wants_weight else None
        grad_hidden = torch.empty_like(hidden_TD) if wants_hidden else None
        # Made once: a fresh block of this size per chunk would be mapped and zeroed by the system each time.
        logits_CV = hidden.new_empty(min(chunk_size, hidden.shape[0]), weight.shape[0])
        log_probs_CV = torch.empty_like(logits_CV, dtype=torch.float32)
        with torch.autocast(hidden.device.type, enabled=False):
            for start in range(0, labels_T.shape[0], chunk_size):
                chunk = slice(start, start + chunk_size)
                rows = hidden[chunk].shape[0]
                logits = torch.mm(hidden[chunk], weight.T, out=logits_CV[:rows])
                log_probs = torch.log_softmax(logits.float(), -1, out=log_probs_CV[:rows])
                labels = labels_T[chunk].clamp(min=0)[:, None]
                log_prob = log_probs.gather(-1, labels)
                logsumexp = logits.gather(-1, labels).float() - log_prob
                terms = torch.stack((-log_prob, logsumexp.square())).squeeze(-1)
                sums += terms.where(real_T[chunk], 0.0).sum(-1)
                if not (wants_hidden or wants_weight):
                    continue
                # d CE = probs - onehot and d logsumexp^2 = 2 logsumexp probs; the mean's weight of each token
                # goes to the narrow factor of the products.
                grad = log_probs.exp_().mul_(1 + 2 * z_weight * logsumexp) if z_weight else log_probs.exp_()
                grad = grad.scatter_add_(-1, labels, grad.new_full((rows, 1), -1.0)).to(dtype)
                scale = scale_T[chunk, None].to(dtype)
                if grad_hidden is not None:
                    grad_hidden[chunk] = (grad @ weight) * scale
                if grad_weight is not None:
                    _add_product_(grad_weight, grad.T, hidden[chunk] * scale)
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


def _add_product_(total: Tensor, a: Tensor, b: Tensor) -> None:
    """total += a @ b, in one pass where the dtypes agree."""
    if a.dtype == total.dtype:
        total.addmm_(a, b)
    else:
        total += a @ b
