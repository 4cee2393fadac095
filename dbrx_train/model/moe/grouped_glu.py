"""All experts' gated units on tokens sorted by expert, as two operators of torch: forward and backward.

    y = weight * (silu(x w1') * (x v1')) w2, each token with the matrices of its expert

Kept for the backward pass are x, x w1' and x v1' alone, and every gradient is written once, where it
belongs; autograd would keep more than twice as much, and join pieces. Being operators, they are kept or
recomputed as a whole by selective activation checkpointing, and are opaque to torch.compile.

Shape suffixes: N tokens sorted by expert, D d_model, F ffn_hidden_size, E experts.
"""

from __future__ import annotations

import importlib
import importlib.util
from collections.abc import Iterator
from typing import Any, Protocol

import torch
from torch import Tensor
from torch.nn import functional as F
from torch.utils.flop_counter import register_flop_formula

__all__ = ["Products", "backward_at_once", "check_available", "forward_at_once", "grouped_glu"]


def grouped_glu(
    x_ND: Tensor,
    weight_N: Tensor | None,
    w1_EFD: Tensor,
    v1_EFD: Tensor,
    w2_EFD: Tensor,
    tokens_per_expert: Tensor,
    impl: str = "auto",
    answers: bool = True,
) -> Tensor:
    """x [N, D] sorted by expert, weight [N] or None, w1, v1, w2 [E, F, D], tokens_per_expert [E] -> y [N, D].

    impl: `grouped` (expert by expert), `grouped_mm` (torch 2.10 or later; the host does not wait for the
    counts), `grouped_gemm` (the kernels of MegaBlocks, bfloat16 on CUDA), or `auto`, the best that is there.
    On CUDA a single expert is multiplied as it is, whichever is asked for.
    answers: False leaves out the product for y, which is zero and takes no memory, for when only what the
    backward pass asks for is computed again.
    """
    y_ND: Tensor = _forward(x_ND, weight_N, w1_EFD, v1_EFD, w2_EFD, tokens_per_expert, impl, answers)[0]
    return y_ND


def check_available(impl: str) -> None:
    """Raises ValueError if what ``impl`` names is not installed."""
    if impl == "grouped_gemm" and importlib.util.find_spec("grouped_gemm") is None:
        raise ValueError(
            "expert_impl: grouped_gemm is not installed; docs/install.md says how, or use grouped_mm (torch "
            "2.10 or later)"
        )
    if impl == "grouped_mm" and not hasattr(F, "grouped_mm"):
        raise ValueError(f"expert_impl: torch {torch.__version__} has no grouped_mm; 2.10 or later has")


@torch.library.custom_op("dbrx_train::grouped_glu", mutates_args=())
def _forward(
    x: Tensor,
    weight: Tensor | None,
    w1: Tensor,
    v1: Tensor,
    w2: Tensor,
    counts: Tensor,
    impl: str,
    answers: bool,
) -> tuple[Tensor, Tensor, Tensor]:
    """y [N, D], and x w1' and x v1' [N, F]."""
    if (products := _products(impl, x, w1, counts)) is None:
        return _forward_by_expert(x, weight, w1, v1, w2, counts, answers)
    return forward_at_once(products, x, weight, w1, v1, w2, answers)


@torch.library.custom_op("dbrx_train::grouped_glu_backward", mutates_args=())
def _backward(
    dy: Tensor,
    x: Tensor,
    gate: Tensor,
    up: Tensor,
    weight: Tensor | None,
    w1: Tensor,
    v1: Tensor,
    w2: Tensor,
    counts: Tensor,
    impl: str,
    trains: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """Gradients of x, weight, w1, v1 and w2; those of the last three are empty unless ``trains``."""
    if (products := _products(impl, x, w1, counts)) is None:
        return _backward_by_expert(dy, x, gate, up, weight, w1, v1, w2, counts, trains)
    return backward_at_once(products, dy, x, gate, up, weight, w1, v1, w2, trains)


# --- expert by expert ---------------------------------------------------------------------------------------

# oneDNN compiles a kernel for every new number of rows, which takes longer than most products: on a CPU,
# bfloat16 segments are rounded up to these. What is computed too much is overwritten by the next expert.
_ROWS = 16


def _segments(x: Tensor, counts: Tensor) -> Iterator[tuple[int, slice, int]]:
    """Each expert that has tokens, the rows to compute with it, and how many of these are its own."""
    step = _ROWS if x.device.type == "cpu" and x.element_size() == 2 else 1
    start = 0
    for expert, count in enumerate(counts.tolist()):
        if count:
            yield expert, slice(start, start - (-count // step) * step), count
        start += count


def _rows(tensor: Tensor, span: slice) -> Tensor:
    """tensor[span], with zeros where it ends earlier."""
    rows = tensor[span]
    missing = span.stop - span.start - rows.shape[0]
    return rows if not missing else torch.cat([rows, rows.new_zeros(missing, *rows.shape[1:])])


def _forward_by_expert(
    x: Tensor, weight: Tensor | None, w1: Tensor, v1: Tensor, w2: Tensor, counts: Tensor, answers: bool
) -> tuple[Tensor, Tensor, Tensor]:
    (total, _), ffn = x.shape, w1.shape[1]
    segments = list(_segments(x, counts))
    gate, up = x.new_empty(total + _ROWS, ffn), x.new_empty(total + _ROWS, ffn)
    y = x.new_empty(total + _ROWS, x.shape[1]) if answers else _zeros(x)
    scratch = x.new_empty(_longest(segments), ffn)
    for expert, span, _ in segments:
        rows, g, u = _rows(x, span), gate[span], up[span]
        torch.mm(rows, w1[expert].T, out=g)
        torch.mm(rows, v1[expert].T, out=u)
        if not answers:
            continue
        hidden = _silu(g, out=scratch[: len(rows)]).mul_(u)
        torch.mm(hidden, w2[expert], out=y[span])
        if weight is not None:
            y[span].mul_(_rows(weight, span)[:, None])
    return y[:total], gate[:total], up[:total]


def _backward_by_expert(
    dy: Tensor,
    x: Tensor,
    gate: Tensor,
    up: Tensor,
    weight: Tensor | None,
    w1: Tensor,
    v1: Tensor,
    w2: Tensor,
    counts: Tensor,
    trains: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    segments = list(_segments(x, counts))
    dx = x.new_empty(x.shape[0] + _ROWS, x.shape[1])
    dweight = x.new_empty(0 if weight is None else x.shape[0] + _ROWS)
    dw1, dv1, dw2 = (torch.empty_like(w) if trains else x.new_empty(0) for w in (w1, v1, w2))
    if trains:
        for expert in (counts == 0).nonzero().flatten().tolist():
            for grad in (dw1, dv1, dw2):
                grad[expert].zero_()
    scratch = x.new_empty(4, _longest(segments), w1.shape[1])
    for expert, span, count in segments:
        dys, xs, g, u = (_rows(rows, span) for rows in (dy, x, gate, up))
        dh, active, hidden, other = scratch[:, : len(xs)]
        torch.mm(dys, w2[expert].T, out=dh)
        _silu(g, out=active)
        torch.mul(active, u, out=hidden)
        if weight is not None:
            torch.sum(torch.mul(dh, hidden, out=other), -1, out=dweight[span])
            factor = _rows(weight, span)[:, None]
            hidden.mul_(factor)
            dh.mul_(factor)
        for narrow in (dh, hidden):  # the next expert's tokens count in no gradient of this one's matrices
            narrow[count:].zero_()
        dup, dgate = active.mul_(dh), other
        torch.ops.aten.silu_backward.grad_input(dh.mul_(u), g, grad_input=dgate)
        torch.mm(dgate, w1[expert], out=dx[span]).addmm_(dup, v1[expert])
        if trains:
            torch.mm(hidden.T, dys, out=dw2[expert])
            torch.mm(dgate.T, xs, out=dw1[expert])
            torch.mm(dup.T, xs, out=dv1[expert])
    return dx[: len(x)], dweight[: len(x)], dw1, dv1, dw2


def _zeros(like: Tensor) -> Tensor:
    """All rows are one number."""
    return like.new_zeros(()).expand(like.shape)


def _longest(segments: list[tuple[int, slice, int]]) -> int:
    return max((span.stop - span.start for _, span, _ in segments), default=0)


def _silu(x: Tensor, out: Tensor) -> Tensor:
    result: Tensor = torch.ops.aten.silu.out(x, out=out)
    return result


# --- all experts at once ------------------------------------------------------------------------------------


class Products(Protocol):
    """Products of rows sorted by expert."""

    def rows(self, a: Tensor, b: Tensor, transposed: bool) -> Tensor:
        """a [N, K] times its expert's matrix in b: [E, K, M], or [E, M, K] if ``transposed`` -> [N, M]."""

    def matrices(self, a: Tensor, b: Tensor) -> Tensor:
        """a [N, K]' b [N, M] of each expert's rows -> [E, K, M]."""


class _GroupedMm:
    """torch's own, which reads the counts on the device."""

    def __init__(self, counts: Tensor) -> None:
        self.ends = counts.cumsum(0, dtype=torch.int32)
        self.mm: Any = torch.nn.functional.grouped_mm  # type: ignore[attr-defined,unused-ignore]

    def rows(self, a: Tensor, b: Tensor, transposed: bool) -> Tensor:
        y: Tensor = self.mm(a, b.mT if transposed else b, offs=self.ends)
        return y

    def matrices(self, a: Tensor, b: Tensor) -> Tensor:
        y: Tensor = self.mm(a.T, b, offs=self.ends)
        return y


class _GroupedGemm:
    """MegaBlocks' kernels, whose usual build wants the counts on the host."""

    def __init__(self, counts: Tensor) -> None:
        self.counts = counts.cpu()
        self.gmm: Any = importlib.import_module("grouped_gemm.backend").gmm

    def rows(self, a: Tensor, b: Tensor, transposed: bool) -> Tensor:
        y: Tensor = self.gmm(a.contiguous(), b.contiguous(), self.counts, trans_b=transposed)
        return y

    def matrices(self, a: Tensor, b: Tensor) -> Tensor:
        y: Tensor = self.gmm(a.contiguous(), b.contiguous(), self.counts, trans_a=True)
        return y


class _OneExpert:
    """Of a dense model, for which plain products do, and no counts are needed."""

    def rows(self, a: Tensor, b: Tensor, transposed: bool) -> Tensor:
        return torch.mm(a, b[0].T if transposed else b[0])

    def matrices(self, a: Tensor, b: Tensor) -> Tensor:
        return torch.mm(a.T, b)[None]


def forward_at_once(
    products: Products,
    x: Tensor,
    weight: Tensor | None,
    w1: Tensor,
    v1: Tensor,
    w2: Tensor,
    answers: bool = True,
) -> tuple[Tensor, Tensor, Tensor]:
    """y [N, D], and x w1' and x v1' [N, F]."""
    gate, up = products.rows(x, w1, True), products.rows(x, v1, True)
    if not answers:
        return _zeros(x), gate, up
    y = products.rows(F.silu(gate).mul_(up), w2, False)
    return y if weight is None else y.mul_(weight[:, None]), gate, up


def backward_at_once(
    products: Products,
    dy: Tensor,
    x: Tensor,
    gate: Tensor,
    up: Tensor,
    weight: Tensor | None,
    w1: Tensor,
    v1: Tensor,
    w2: Tensor,
    trains: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """Gradients of x, weight, w1, v1 and w2; those of the last three are empty unless ``trains``."""
    # No more than two of a width F beside gate and up, at the price of silu(gate) made twice.
    dh = products.rows(dy, w2, True)
    hidden = F.silu(gate).mul_(up)
    dweight = x.new_empty(0)
    if weight is not None:
        dweight = torch.linalg.vecdot(dh, hidden)
        hidden.mul_(weight[:, None])
        dh.mul_(weight[:, None])
    dw1 = dv1 = dw2 = x.new_empty(0)
    if trains:
        dw2 = products.matrices(hidden, dy)
    del hidden
    dup = F.silu(gate).mul_(dh)
    dgate = torch.ops.aten.silu_backward.grad_input(dh.mul_(up), gate, grad_input=dh)
    dx = products.rows(dgate, w1, False)
    if trains:
        dw1 = products.matrices(dgate, x)
    del dh, dgate
    dx.add_(products.rows(dup, v1, False))
    if trains:
        dv1 = products.matrices(dup, x)
    return dx, dweight, dw1, dv1, dw2


def _products(impl: str, x: Tensor, w: Tensor, counts: Tensor) -> Products | None:
    """What multiplies all experts at once; None if they are to go one by one."""
    if x.is_cuda and len(w) == 1:
        return _OneExpert()
    if impl == "grouped_mm":
        return _GroupedMm(counts)
    if impl == "grouped_gemm":
        return _GroupedGemm(counts)
    if impl != "auto" or not x.is_cuda or x.dtype != torch.bfloat16:
        return None
    if hasattr(F, "grouped_mm") and all(width % 8 == 0 for width in w.shape[1:]):  # rows of 16 bytes
        return _GroupedMm(counts)
    return _GroupedGemm(counts) if importlib.util.find_spec("grouped_gemm") else None


# --- what torch wants to know of an operator ----------------------------------------------------------------


@_forward.register_fake
def _(
    x: Tensor, weight: Any, w1: Tensor, v1: Tensor, w2: Tensor, counts: Tensor, impl: str, answers: bool
) -> Any:
    hidden = x.shape[0], w1.shape[1]
    return torch.empty_like(x) if answers else _zeros(x), x.new_empty(hidden), x.new_empty(hidden)


@_backward.register_fake
def _(
    dy: Tensor, x: Tensor, gate: Tensor, up: Tensor, weight: Any, w1: Tensor, v1: Tensor, w2: Tensor,
    counts: Tensor, impl: str, trains: bool,
) -> Any:  # fmt: skip
    grads = (torch.empty_like(w) if trains else x.new_empty(0) for w in (w1, v1, w2))
    return torch.empty_like(x), x.new_empty(0 if weight is None else x.shape[0]), *grads


def _keep(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor, Tensor]) -> None:
    x, weight, w1, v1, w2, counts, ctx.impl, _ = inputs
    _, gate, up = output
    ctx.save_for_backward(x, gate, up, weight, w1, v1, w2, counts)
    ctx.set_materialize_grads(False)


def _differentiate(ctx: Any, dy: Tensor | None, *_: Any) -> tuple[Tensor | None, ...]:
    if dy is None:
        return (None,) * 8
    trains, saved = any(ctx.needs_input_grad[2:5]), ctx.saved_tensors
    dx, dweight, *grads = _backward(dy.contiguous(), *saved, ctx.impl, trains)
    return dx, None if saved[3] is None else dweight, *(grads if trains else (None,) * 3), *(None,) * 3


_forward.register_autograd(_differentiate, setup_context=_keep)


@register_flop_formula(torch.ops.dbrx_train.grouped_glu)
def _forward_flops(x_shape: Any, weight_shape: Any, w1_shape: Any, *rest: Any, **__: Any) -> int:
    answers = rest[4]
    return (6 if answers else 4) * int(x_shape[0] * x_shape[1] * w1_shape[1])


@register_flop_formula(torch.ops.dbrx_train.grouped_glu_backward)
def _backward_flops(dy_shape: Any, x_shape: Any, gate_shape: Any, *rest: Any, **__: Any) -> int:
    trains = rest[7]
    return (12 if trains else 6) * int(x_shape[0] * x_shape[1] * gate_shape[1])
