"""The mixture-of-experts layer: route, dispatch, experts, combine.

Shape suffixes: T tokens, D d_model, k experts per token, N = T * k.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from dbrx_train.model.config import DbrxConfig
from dbrx_train.model.experts import Experts
from dbrx_train.model.init import init_weights
from dbrx_train.model.precision import compute_dtype
from dbrx_train.model.router import Router, Routing, count_tokens


class MoE(nn.Module):
    """Feed-forward layer of `num_experts` gated experts, of which each token visits `top_k`.

    No capacity and no dropped tokens. With `num_experts` 1 it is a dense gated layer without a router.
    """

    def __init__(self, config: DbrxConfig) -> None:
        super().__init__()
        self.num_experts, self.top_k = config.num_experts, config.top_k
        self.router = None if config.is_dense else Router(config)
        self.experts = Experts(config)
        if not self.experts.mlp.w1.is_meta:
            init_weights(self, config, seed=int(torch.randint(2**62, (), device="cpu")))

    def forward(self, x: Tensor, token_mask: Tensor | None = None) -> tuple[Tensor, Routing | None]:
        """x [..., D] -> y [..., D] and the routing of x's tokens in row-major order (None when dense).

        token_mask [...]: False for padding, which is computed but left out of the routing's counts.
        """
        x_TD = x.reshape(-1, x.shape[-1])
        if self.router is None:
            tokens = torch.tensor([x_TD.shape[0]], device="cpu")
            return self.experts(x_TD.to(compute_dtype(x)), tokens).view(x.shape), None

        routing: Routing = self.router(x_TD, None if token_mask is None else token_mask.flatten())
        order_N = routing.expert_ids.flatten().argsort(stable=True)
        place_N = inverse(order_N)
        tokens_per_expert = (
            routing.tokens_per_expert
            if token_mask is None
            else count_tokens(routing.expert_ids, self.num_experts)
        )

        sorted_ND = gather(x_TD.to(compute_dtype(x)), order_N // self.top_k, place_N.view(-1, self.top_k))
        y_ND = gather(self.experts(sorted_ND, tokens_per_expert), place_N, order_N[:, None])
        y_TkD = y_ND.view(*routing.expert_ids.shape, x.shape[-1])
        y_TD = torch.bmm(routing.weights[:, None].to(y_TkD.dtype), y_TkD)
        return y_TD.view(x.shape), routing


def inverse(order_N: Tensor) -> Tensor:
    """The permutation that undoes ``order_N`` [N]."""
    place_N = torch.empty_like(order_N)
    place_N[order_N] = torch.arange(order_N.numel(), device=order_N.device)
    return place_N


def gather(rows: Tensor, index: Tensor, places: Tensor) -> Tensor:
    """rows[index]; places [rows, copies] lists the places in the result of each row's copies.

    Its backward is a gather too: unlike index_add it is deterministic and needs no atomics.
    """
    out: Tensor = _Gather.apply(rows, index, places)  # type: ignore[no-untyped-call]
    return out


class _Gather(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, rows: Tensor, index: Tensor, places: Tensor) -> Tensor:
        ctx.save_for_backward(places)
        return rows.index_select(0, index)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None, None]:
        (places,) = ctx.saved_tensors
        copies = grad.index_select(0, places.flatten()).view(*places.shape, grad.shape[-1])
        return (copies.squeeze(1) if copies.shape[1] == 1 else copies.sum(1)), None, None
