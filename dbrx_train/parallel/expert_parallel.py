"""Expert parallelism: each rank of a group holds some experts of every layer, and tokens travel to them.

Shape suffixes: N tokens sorted by expert on the rank that they come from (top_k copies of each), M tokens
that arrived, D d_model, E experts, R ranks of the group, e = E / R experts of this rank.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from dbrx_train.model.moe.experts import GatedExperts
from dbrx_train.model.moe.layer import inverse

__all__ = ["Received", "TokenDispatcher"]


@dataclass
class Received:
    """What a forward pass got from other ranks, for its repetition in the backward pass."""

    keeps_tokens: bool
    """Whether the tokens are kept too, beside their counts and weights, which are small."""
    counts_Re: Tensor | None = None
    """How many tokens of each rank for each expert of this one; None until the forward pass is over."""
    splits: tuple[list[int], list[int]] = ([], [])
    x_MD: Tensor | None = None
    weight_M1: Tensor | None = None

    def give_tokens(self) -> Tensor | None:
        """The tokens, which then are kept no longer."""
        x_MD, self.x_MD = self.x_MD, None
        return x_MD


class TokenDispatcher:
    """Brings each token to the rank that holds its expert, and the expert's answer back. No token is dropped.

    Weights of the answers, if any, go along: applied where the experts are, they need no answers kept for
    their gradient. Two all-to-alls of variable splits forward and two backward. The ranks' losses are
    averaged in the end, but an expert's gradient is the sum over the tokens of all R ranks, so on its way
    into the experts the gradient is divided by R, and multiplied again on its way out to the tokens.

    A forward pass under ``keeping`` that is repeated under it asks other ranks for nothing that was kept, and
    sends no answers, which no gradient depends on: what it returns is zero.
    """

    def __init__(self, group: dist.ProcessGroup) -> None:
        self.group, self.ranks = group, group.size()
        self.received: Received | None = None

    @contextmanager
    def keeping(self, received: Received) -> Iterator[None]:
        """What is got from other ranks goes into ``received`` or, if that was filled, comes from it."""
        self.received = received
        try:
            yield
        finally:
            self.received = None

    def __call__(
        self, experts: GatedExperts, x_ND: Tensor, tokens_per_expert: Tensor, weight_N: Tensor | None = None
    ) -> Tensor:
        """x [N, D] sorted by expert, tokens_per_expert [E] of this rank -> the experts' outputs [N, D]."""
        received = self.received or Received(keeps_tokens=False)
        repeats = received.counts_Re is not None
        if received.counts_Re is None:
            sent_Re = tokens_per_expert.view(self.ranks, -1)
            received.counts_Re = torch.empty_like(sent_Re)
            dist.all_to_all_single(received.counts_Re, sent_Re.contiguous(), group=self.group)
            received.splits = self.splits(sent_Re, received.counts_Re)
        got_Re, (leaving, arriving) = received.counts_Re, received.splits

        # Arrived tokens lie by rank, then by expert; the experts want them by expert.
        expert_M = torch.arange(got_Re.shape[1], device=x_ND.device).repeat(self.ranks)
        expert_M = expert_M.repeat_interleave(got_Re.flatten(), output_size=sum(arriving))
        order_M = expert_M.argsort(stable=True)
        place_M = inverse(order_M)

        def brought(rows: Tensor, known: Tensor | None) -> Tensor:
            rows = _AllToAll.apply(rows, leaving, arriving, self.group, float(self.ranks), known is not None)  # type: ignore[no-untyped-call]
            arrived: Tensor = _Ordered.apply(rows, order_M, place_M, known)  # type: ignore[no-untyped-call]
            return arrived  # as they lay by rank they are not needed any more

        weight_M = None
        if weight_N is not None:
            weight_M1 = brought(weight_N[:, None], received.weight_M1)
            received.weight_M1, weight_M = weight_M1.detach(), weight_M1[:, 0]
        x_MD = brought(x_ND, received.give_tokens())
        if received.keeps_tokens and not repeats:
            received.x_MD = x_MD.detach()
        y_MD = experts(x_MD, got_Re.sum(0), weight_M)
        del x_MD
        y_MD = _Ordered.apply(y_MD, place_M, order_M, y_MD.detach() if repeats else None)  # type: ignore[no-untyped-call]
        y_ND: Tensor = _AllToAll.apply(y_MD, arriving, leaving, self.group, 1 / self.ranks, repeats)  # type: ignore[no-untyped-call]
        return y_ND

    def splits(self, sent_Re: Tensor, got_Re: Tensor) -> tuple[list[int], list[int]]:
        """Rows that go to each rank of the group, and that come from each; the host waits for them."""
        leaving, arriving = torch.stack([sent_Re.sum(1), got_Re.sum(1)]).tolist()
        return leaving, arriving


class _AllToAll(torch.autograd.Function):
    """Rows to the ranks of a group, so many to each; the gradient comes back multiplied by ``scale``.

    If ``idle``, none are sent and all that arrive are zero.
    """

    @staticmethod
    def forward(
        ctx: Any,
        rows: Tensor,
        leaving: list[int],
        arriving: list[int],
        group: dist.ProcessGroup,
        scale: float,
        idle: bool,
    ) -> Tensor:
        ctx.splits, ctx.group, ctx.scale = (arriving, leaving), group, scale
        if idle:
            return rows.new_zeros(()).expand(sum(arriving), rows.shape[1])
        return _exchange(rows, leaving, arriving, group)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None, None, None, None, None]:
        leaving, arriving = ctx.splits
        return _exchange(grad * ctx.scale, leaving, arriving, ctx.group), None, None, None, None, None


class _Ordered(torch.autograd.Function):
    """rows[order], or ``known`` if that is what they are; ``place`` is the inverse of ``order``."""

    @staticmethod
    def forward(ctx: Any, rows: Tensor, order: Tensor, place: Tensor, known: Tensor | None) -> Tensor:
        ctx.save_for_backward(place)
        return rows.index_select(0, order) if known is None else known.view_as(known)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None, None, None]:
        return grad.index_select(0, *ctx.saved_tensors), None, None, None


def _exchange(rows: Tensor, leaving: list[int], arriving: list[int], group: dist.ProcessGroup) -> Tensor:
    result = rows.new_empty(sum(arriving), rows.shape[1])
    dist.all_to_all_single(result, rows.contiguous(), arriving, leaving, group=group)
    return result
