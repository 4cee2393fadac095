"""Expert parallelism: each rank of a group holds some experts of every layer, and tokens travel to them.

Shape suffixes: N tokens sorted by expert on the rank that they come from (top_k copies of each), M tokens
that arrived, D d_model, E experts, R ranks of the group, e = E / R experts of this rank.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from dbrx_train.model.moe.experts import GatedExperts
from dbrx_train.model.moe.layer import dispatch, inverse

__all__ = ["TokenDispatcher"]


class TokenDispatcher:
    """Brings each token to the rank that holds its expert, and the expert's answer back. No token is dropped.

    Weights of the answers, if any, go along: applied where the experts are, they need no answers kept for
    their gradient. Two all-to-alls of variable splits forward and two backward. The ranks' losses are
    averaged in the end, but an expert's gradient is the sum over the tokens of all R ranks, so on its way
    into the experts the gradient is divided by R, and multiplied again on its way out to the tokens.
    """

    def __init__(self, group: dist.ProcessGroup) -> None:
        self.group, self.ranks = group, group.size()

    def __call__(
        self, experts: GatedExperts, x_ND: Tensor, tokens_per_expert: Tensor, weight_N: Tensor | None = None
    ) -> Tensor:
        """x [N, D] sorted by expert, tokens_per_expert [E] of this rank -> the experts' outputs [N, D]."""
        sent_Re = tokens_per_expert.view(self.ranks, -1)
        got_Re = torch.empty_like(sent_Re)
        dist.all_to_all_single(got_Re, sent_Re.contiguous(), group=self.group)
        leaving, arriving = self.splits(sent_Re, got_Re)

        # Arrived tokens lie by rank, then by expert; the experts want them by expert.
        expert_M = torch.arange(got_Re.shape[1], device=x_ND.device).repeat(self.ranks)
        expert_M = expert_M.repeat_interleave(got_Re.flatten(), output_size=sum(arriving))
        order_M = expert_M.argsort(stable=True)
        place_M = inverse(order_M)

        def brought(rows: Tensor) -> Tensor:
            rows = _AllToAll.apply(rows, leaving, arriving, self.group, float(self.ranks))  # type: ignore[no-untyped-call]
            return dispatch(rows, order_M, place_M[:, None])  # by rank they are not needed any more

        weight_M = None if weight_N is None else brought(weight_N[:, None])[:, 0]
        y_MD = experts(brought(x_ND), got_Re.sum(0), weight_M)
        y_MD = dispatch(y_MD, place_M, order_M[:, None])
        y_ND: Tensor = _AllToAll.apply(y_MD, arriving, leaving, self.group, 1 / self.ranks)  # type: ignore[no-untyped-call]
        return y_ND

    def splits(self, sent_Re: Tensor, got_Re: Tensor) -> tuple[list[int], list[int]]:
        """Rows that go to each rank of the group, and that come from each; the host waits for them."""
        leaving, arriving = torch.stack([sent_Re.sum(1), got_Re.sum(1)]).tolist()
        return leaving, arriving


class _AllToAll(torch.autograd.Function):
    """Rows to the ranks of a group, so many to each; the gradient comes back multiplied by ``scale``."""

    @staticmethod
    def forward(
        ctx: Any,
        rows: Tensor,
        leaving: list[int],
        arriving: list[int],
        group: dist.ProcessGroup,
        scale: float,
    ) -> Tensor:
        ctx.splits, ctx.group, ctx.scale = (arriving, leaving), group, scale
        return _exchange(rows, leaving, arriving, group)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None, None, None, None]:
        leaving, arriving = ctx.splits
        return _exchange(grad * ctx.scale, leaving, arriving, ctx.group), None, None, None, None


def _exchange(rows: Tensor, leaving: list[int], arriving: list[int], group: dist.ProcessGroup) -> Tensor:
    result = rows.new_empty(sum(arriving), rows.shape[1])
    dist.all_to_all_single(result, rows.contiguous(), arriving, leaving, group=group)
    return result
