"""Next-token cross-entropy without ever holding the logits of all tokens.

The loss head computes, for one chunk of tokens at a time, logits, loss and at once the gradients with
respect to the hidden states and the head's weight (the idea of Liger Kernel, arXiv 2410.10989): memory is
[chunk, vocab] instead of [tokens, vocab], and the backward pass recomputes nothing.

Shape suffixes: T tokens, D d_model, V vocabulary.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.autograd.function import once_differentiable

from dbrx_train.model.precision import compute_dtype

IGNORE_INDEX = -100
_ROWS = 4096  # of the vocabulary, whose gradients are scaled at a time


class HeadLoss(NamedTuple):
    """Means over the real labels, float32 scalars; all 0 where there is no label."""

    total: Tensor
    """cross_entropy + z_weight * z; the only one that carries a gradient."""
    cross_entropy: Tensor
    z: Tensor
    """logsumexp(logits)^2, the z-loss of PaLM (arXiv 2204.02311)."""
    num_labels: Tensor
    """int64 scalar."""
    token_losses: Tensor
    """[T] float32, each token's cross-entropy, detached; 0 where there is no label."""


class LMHead(nn.Linear):
    """The output projection: logits, or the loss over labels in chunks of tokens."""

    def __init__(self, d_model: int, vocab_size: int, chunk_size: int, z_weight: float = 0.0) -> None:
        super().__init__(d_model, vocab_size, bias=False)
        self.chunk_size = chunk_size
        self.z_weight = z_weight

    def forward(  # type: ignore[override]
        self, hidden: Tensor, labels: Tensor | None = None, log_probs: bool = False
    ) -> Tensor | HeadLoss:
        """hidden [..., D] -> logits [..., V]; with labels [...] (shifted already, -100 ignored), the loss.

        With ``log_probs``, each label's log-probability instead, float32 [...], 0 where it is ignored.
        """
        if labels is None:
            return super().forward(hidden)
        if log_probs:
            rows, flat = hidden.reshape(-1, hidden.shape[-1]), labels.flatten().long()
            return chunked_log_probs(rows, self.weight, flat, self.chunk_size).view(labels.shape)
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


def chunked_log_probs(hidden_TD: Tensor, weight_VD: Tensor, labels_T: Tensor, chunk_size: int) -> Tensor:
    """Log-probability of each label, float32 [T], 0 for ignored ones; `chunk_size` tokens at a time.

    As their gradients are not known before the end, the backward pass makes the logits once more.
    """
    log_probs: Tensor = _ChunkedLogProbs.apply(hidden_TD, weight_VD, labels_T, chunk_size)  # type: ignore[no-untyped-call]
    return log_probs


class _ChunkedLogProbs(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, hidden_TD: Tensor, weight_VD: Tensor, labels_T: Tensor, chunk_size: int) -> Tensor:
        ctx.dtype, ctx.chunk_size = compute_dtype(hidden_TD), chunk_size
        ctx.save_for_backward(hidden_TD, weight_VD, labels_T)
        chunks = _LogProbChunks(hidden_TD, weight_VD, labels_T, ctx.dtype, chunk_size)
        parts = [(-terms[:, 0]).where(real[:, 0], 0.0) for _, terms, real in chunks]
        return torch.cat(parts)

    @staticmethod
    @once_differentiable  # type: ignore[untyped-decorator]
    def backward(ctx: Any, grad_T: Tensor) -> tuple[Tensor | None, ...]:
        hidden_TD, weight_VD, labels_T = ctx.saved_tensors
        wants_hidden, wants_weight = ctx.needs_input_grad[:2]
        grad_hidden = torch.empty_like(hidden_TD) if wants_hidden else None
        grad_weight = torch.zeros_like(weight_VD, dtype=torch.float32) if wants_weight else None
        chunks = _LogProbChunks(hidden_TD, weight_VD, labels_T, ctx.dtype, ctx.chunk_size)
        for chunk, _, real in chunks:
            # Minus, as d CE = probs - onehot; what scales a token is left to where the products are narrow.
            scale = -grad_T[chunk, None] * real
            grad = chunks.grad(chunk)
            if grad_hidden is not None:
                grad_hidden[chunk] = (grad @ chunks.weight) * scale
            if grad_weight is not None:
                _add_product_(grad_weight, grad.T, (chunks.hidden[chunk] * scale).to(grad.dtype))
        if grad_weight is not None:
            grad_weight = grad_weight.to(weight_VD.dtype)
        return grad_hidden, grad_weight, None, None


class _LogProbChunks:
    """Iterates over chunks: where, their terms (see `_ChunkSoftmax`), and which have a label, [C, 1]."""

    def __init__(
        self, hidden_TD: Tensor, weight_VD: Tensor, labels_T: Tensor, dtype: torch.dtype, chunk_size: int
    ) -> None:
        self.hidden, self.weight, self._labels = hidden_TD.to(dtype), weight_VD.to(dtype), labels_T
        self._size = chunk_size
        self._softmax = _ChunkSoftmax(self.weight, min(chunk_size, labels_T.shape[0]))

    def __iter__(self) -> Iterator[tuple[slice, Tensor, Tensor]]:
        with torch.autocast(self.hidden.device.type, enabled=False):
            for start in range(0, self._labels.shape[0], self._size):
                chunk = slice(start, start + self._size)
                labels = self._labels[chunk, None]
                terms = self._softmax.terms(self.hidden[chunk], labels.clamp(min=0))
                yield chunk, terms, labels != IGNORE_INDEX

    def grad(self, chunk: slice) -> Tensor:
        """Gradient of the latest chunk's cross-entropies with respect to the logits, [C, V]."""
        return self._softmax.grad(self._labels[chunk, None].clamp(min=0), 0.0)


class _ChunkedCrossEntropy(torch.autograd.Function):
    """Keeps gradients of the sum over tokens: the mean's 1 / labels, rounded to bfloat16, would be a bias."""

    @staticmethod
    def forward(
        ctx: Any,
        hidden_TD: Tensor,
        weight_VD: Tensor,
        labels_T: Tensor,
        chunk_size: int,
        z_weight: float,
        wants_grad: bool,
    ) -> tuple[Tensor, ...]:
        dtype = compute_dtype(hidden_TD)
        hidden, weight = hidden_TD.to(dtype), weight_VD.to(dtype)
        wants_hidden, wants_weight = (wants_grad and wanted for wanted in ctx.needs_input_grad[:2])
        grad_hidden = torch.empty_like(hidden_TD) if wants_hidden else None
        # float32, since it adds up many chunks
        grad_weight = torch.zeros_like(weight, dtype=torch.float32) if wants_weight else None
        sums = hidden.new_zeros(2, dtype=torch.float32)
        token_losses = hidden.new_empty(labels_T.shape[0], dtype=torch.float32)
        softmax = _ChunkSoftmax(weight, min(chunk_size, hidden.shape[0]))
        with torch.autocast(hidden.device.type, enabled=False):
            for start in range(0, labels_T.shape[0], chunk_size):
                chunk = slice(start, start + chunk_size)
                real = labels_T[chunk, None] != IGNORE_INDEX
                labels = labels_T[chunk, None].clamp(min=0)
                terms = softmax.terms(hidden[chunk], labels).where(real, 0.0)
                token_losses[chunk] = terms[:, 0]
                sums += terms.sum(0)
                if not (wants_hidden or wants_weight):
                    continue
                grad = softmax.grad(labels, z_weight)
                # A token without a label is left out where the products are narrow.
                if grad_hidden is not None:
                    grad_hidden[chunk] = (grad @ weight) * real
                if grad_weight is not None:
                    _add_product_(grad_weight, grad.T, hidden[chunk] * real)
        num_labels = (labels_T != IGNORE_INDEX).sum()
        divisor = num_labels.clamp(min=1)
        ctx.save_for_backward(grad_hidden, grad_weight, divisor)
        ctx.weight_dtype = weight_VD.dtype
        cross_entropy, z = sums / divisor
        ctx.mark_non_differentiable(cross_entropy, z, num_labels, token_losses)
        return cross_entropy + z_weight * z, cross_entropy, z, num_labels, token_losses

    @staticmethod
    @once_differentiable  # type: ignore[untyped-decorator]
    def backward(ctx: Any, grad_total: Tensor, *_: Tensor) -> tuple[Tensor | None, ...]:
        grad_hidden, grad_weight, divisor = ctx.saved_tensors
        # A matrix of one element, since a scalar would be rounded to the dtype of what it multiplies.
        scale = (grad_total / divisor).view(1, 1)
        if grad_hidden is not None:
            grad_hidden = (grad_hidden * scale).to(grad_hidden.dtype)
        if grad_weight is not None:
            grad_weight = _scaled(grad_weight, scale, ctx.weight_dtype)
        return grad_hidden, grad_weight, None, None, None, None


class _ChunkSoftmax:
    """Softmax over the vocabulary for one chunk of C tokens after another.

    Its memory is taken once: fresh blocks of that size would be mapped and zeroed by the system per chunk.
    """

    def __init__(self, weight_VD: Tensor, chunk_size: int) -> None:
        self._weight = weight_VD
        self._logits = weight_VD.new_empty(chunk_size, weight_VD.shape[0])
        self._log_probs = self._logits
        if weight_VD.dtype != torch.float32:
            self._log_probs = torch.empty_like(self._logits, dtype=torch.float32)

    def terms(self, hidden_CD: Tensor, labels_C1: Tensor) -> Tensor:
        """Cross-entropy and logsumexp^2 of each token, float32 [C, 2]."""
        rows = hidden_CD.shape[0]
        logits = torch.mm(hidden_CD, self._weight.T, out=self._logits[:rows])
        logit = logits.gather(-1, labels_C1).float()
        log_prob = self._normalise(logits).gather(-1, labels_C1)
        self._logsumexp = logit - log_prob
        return torch.cat((-log_prob, self._logsumexp.square()), -1)

    def _normalise(self, logits_CV: Tensor) -> Tensor:
        log_probs = self._log_probs[: logits_CV.shape[0]]
        # Asked for float32 of bfloat16, torch would make a float32 copy of its own first; a row may be
        # normalised where it lies.
        if self._log_probs is not self._logits:
            log_probs.copy_(logits_CV)
        return torch.log_softmax(log_probs, -1, out=log_probs)

    def grad(self, labels_C1: Tensor, z_weight: float) -> Tensor:
        """Gradient of the latest terms' weighted sum with respect to the logits, [C, V] in weight's dtype.

        d CE = probs - onehot and d logsumexp^2 = 2 logsumexp probs. Overwrites logits and log-probabilities.
        """
        rows = labels_C1.shape[0]
        grad = self._log_probs[:rows].exp_()
        if z_weight:
            grad.mul_(1 + 2 * z_weight * self._logsumexp)
        grad.scatter_add_(-1, labels_C1, grad.new_full(labels_C1.shape, -1.0))
        return grad if self._log_probs is self._logits else self._logits[:rows].copy_(grad)


def _scaled(total: Tensor, scale: Tensor, dtype: torch.dtype) -> Tensor:
    """(total * scale).to(dtype), without a float32 copy of the whole: of the head's gradient, it would be
    the largest tensor of the step."""
    if dtype == total.dtype:
        return total * scale
    result = torch.empty_like(total, dtype=dtype)
    for start in range(0, total.shape[0], _ROWS):
        rows = slice(start, start + _ROWS)
        result[rows] = total[rows] * scale
    return result


def _add_product_(total: Tensor, a: Tensor, b: Tensor) -> None:
    """total += a @ b, in one pass where the dtypes agree."""
    if a.dtype == total.dtype:
        total.addmm_(a, b)
    else:
        total += a @ b
