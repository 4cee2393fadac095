"""The mixture-of-experts layer: route, dispatch, experts, combine.

Shape suffixes: T tokens, D d_model, k experts per token, N = T * k.
"""

from __future__ import annotations

from dataclasses import fields
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from dbrx_train.errors import nearest
from dbrx_train.model.config import DbrxConfig
from dbrx_train.model.init import init_weights
from dbrx_train.model.moe.experts import Experts
from dbrx_train.model.moe.router import Router, Routing, count_tokens
from dbrx_train.model.precision import compute_dtype


class MoE(nn.Module):
    """Feed-forward layer of `num_experts` gated experts, of which each token visits `top_k`.

    No capacity and no dropped tokens. With `num_experts` 1 it is a dense gated layer without a router.

    For a model of your own, by what the layer itself is; add its balance loss to yours, times a weight such
    as 0.05, or the router comes to send all tokens to a few experts:

    >>> from dbrx_train.model.moe.load_balancing import balance_loss
    >>> layer = MoE(d_model=64, num_experts=8, top_k=2)
    >>> y, routing = layer(torch.randn(3, 10, 64))
    >>> loss = y.square().mean() + 0.05 * balance_loss([routing], "megablocks")  # of all layers' routings

    Args:
        config: the model that it is a layer of.
        options: fields of `DbrxConfig` instead. `d_model` must be given; `ffn_hidden_size` is 1.75 times that
            unless it is, and all weights are drawn with `init_std`, since how deep the model is is not known:
            give `n_layers` to have what writes to the residual stream scaled by 1 / sqrt(2 n_layers).

    Raises:
        ValueError: an option is none of a layer, or makes none.
    """

    def __init__(self, config: DbrxConfig | None = None, **options: Any) -> None:
        super().__init__()
        if (config is None) == (not options):
            raise ValueError("MoE: takes a config, or options such as d_model, and not both")
        config = config or _layer_config(options)
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

        sorted_ND = dispatch(x_TD.to(compute_dtype(x)), order_N // self.top_k, place_N.view(-1, self.top_k))
        weight_N = routing.weights.flatten()[order_N].to(sorted_ND.dtype)
        y_ND = self.experts(sorted_ND, tokens_per_expert, weight_N)
        y_TD = combine(y_ND, place_N.view(-1, self.top_k), order_N // self.top_k)
        return y_TD.view(x.shape), routing


def _layer_config(options: dict[str, Any]) -> DbrxConfig:
    """The configuration of a layer alone: what it does not look at is as small as can be."""
    if "d_model" not in options:
        raise ValueError("d_model: is missing; it is the width of what the layer is given")
    known = [field.name for field in fields(DbrxConfig)]
    for name in options:
        if name not in known:
            raise ValueError(f"{name}: no such option{nearest(name, known)}")
    alone = {"n_heads": 1, "n_kv_heads": 1, "ffn_hidden_size": 7 * options["d_model"] // 4, "n_layers": 1}
    return DbrxConfig(**alone | {"init_residual_scaling": "n_layers" in options} | options)


def inverse(order_N: Tensor) -> Tensor:
    """The permutation that undoes ``order_N`` [N]."""
    place_N = torch.empty_like(order_N)
    place_N[order_N] = torch.arange(order_N.numel(), device=order_N.device)
    return place_N


def dispatch(rows: Tensor, source_N: Tensor, places_Tk: Tensor) -> Tensor:
    """rows [T, D] -> rows[source], [N, D]; places [T, k] lists where the copies of each row then lie.

    Its backward is `combine`: unlike index_add it is deterministic and needs no atomics.
    """
    out: Tensor = _Dispatch.apply(rows, source_N, places_Tk)  # type: ignore[no-untyped-call]
    return out


def combine(rows: Tensor, places_Tk: Tensor, source_N: Tensor) -> Tensor:
    """rows [N, D] -> the sum of rows[places], [T, D]; the transpose of `dispatch`, and its backward."""
    out: Tensor = _Combine.apply(rows, places_Tk, source_N)  # type: ignore[no-untyped-call]
    return out


def _sum_of(rows: Tensor, places_Tk: Tensor) -> Tensor:
    if rows.shape[0] > 1 and rows.stride(0) == 0:  # one row, and the answers left out of a repetition are one
        return (rows[:1] * places_Tk.shape[1]).expand(places_Tk.shape[0], -1)
    if places_Tk.shape[1] == 1:
        return rows.index_select(0, places_Tk[:, 0])
    return F.embedding_bag(places_Tk, rows, mode="sum")  # reads each row once, and makes no copies


class _Dispatch(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, rows: Tensor, source: Tensor, places: Tensor) -> Tensor:
        ctx.save_for_backward(places)
        return rows.index_select(0, source)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None, None]:
        return _sum_of(grad.contiguous(), *ctx.saved_tensors), None, None


class _Combine(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, rows: Tensor, places: Tensor, source: Tensor) -> Tensor:
        ctx.save_for_backward(source)
        return _sum_of(rows, places)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None, None]:
        return grad.index_select(0, *ctx.saved_tensors), None, None
