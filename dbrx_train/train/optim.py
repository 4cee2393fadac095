"""Optimizers and what they apply to."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch import nn

from dbrx_train.config import OptimizerConfig
from dbrx_train.model.decoder import Dbrx
from dbrx_train.model.moe.experts import GatedExperts
from dbrx_train.model.moe.router import Router
from dbrx_train.train.bfloat16_adamw import BFloat16AdamW


class LionW(torch.optim.Optimizer):
    """Lion with decoupled weight decay (arXiv 2302.06675, Algorithm 2).

    update = sign(β1·m + (1 - β1)·g);  p ← (1 - lr·λ)·p - lr·update;  m ← β2·m + (1 - β2)·g
    """

    def __init__(
        self,
        params: Iterable[Any],
        lr: float = 1e-4,
        betas: tuple[float, float] = (0.9, 0.99),
        weight_decay: float = 0.0,
    ) -> None:
        super().__init__(params, {"lr": lr, "betas": betas, "weight_decay": weight_decay})

    @torch.no_grad()
    def step(self, closure: Callable[[], Any] | None = None) -> Any:
        loss = None
        if closure is not None:
            with torch.enable_grad():  # type: ignore[no-untyped-call]
                loss = closure()
        for group in self.param_groups:
            lr, (beta1, beta2) = group["lr"], group["betas"]
            for p in group["params"]:
                if p.grad is None:
                    continue
                state = self.state[p]
                if not state:
                    state["exp_avg"] = torch.zeros_like(p)
                momentum = state["exp_avg"]
                p.mul_(1 - lr * group["weight_decay"])
                p.add_(momentum.lerp(p.grad, 1 - beta1).sign_(), alpha=-lr)
                momentum.lerp_(p.grad, 1 - beta2)
        return loss


def parameter_groups(model: Dbrx, config: OptimizerConfig) -> list[dict[str, Any]]:
    """Norms never decay; embedding and head by choice; routers may have a learning rate of their own.

    Every group remembers its peak learning rate as ``peak_lr``. Parameters that are frozen are in none.
    """
    routers = {id(p) for m in model.modules() if isinstance(m, Router) for p in m.parameters()}
    embeddings = {id(p) for m in (model.transformer.wte, model.lm_head) for p in m.parameters()}
    norms = {
        id(p) for m in model.modules() if isinstance(m, nn.LayerNorm | nn.RMSNorm) for p in m.parameters()
    }

    experts = {id(p) for m in model.modules() if isinstance(m, GatedExperts) for p in m.parameters()}

    def group_of(p: nn.Parameter) -> str:
        if id(p) in norms:
            return "norms"
        if id(p) in routers:
            return "routers"
        if id(p) in experts:  # apart, for under expert parallelism they lie on another mesh
            return "experts"
        return "embeddings" if id(p) in embeddings else "matrices"

    members: dict[str, list[nn.Parameter]] = {}
    for p in filter(lambda p: p.requires_grad, model.parameters()):
        members.setdefault(group_of(p), []).append(p)
    groups = []
    for name, params in members.items():
        lr = config.lr * (config.router_lr_scale if name == "routers" else 1.0)
        decays = name != "norms" and (name != "embeddings" or config.decay_embeddings)
        decay = config.weight_decay if decays else 0.0
        groups.append({"name": name, "params": params, "lr": lr, "peak_lr": lr, "weight_decay": decay})
    return groups


def _adamw(groups: list[dict[str, Any]], config: OptimizerConfig) -> torch.optim.Optimizer:
    """AdamW (arXiv 1711.05101), torch's fused kernel; another where the moments are in bfloat16."""
    betas = (config.betas[0], config.betas[1])
    if config.state_dtype == "bfloat16":
        return BFloat16AdamW(groups, lr=config.lr, betas=betas, eps=config.eps)
    return torch.optim.AdamW(groups, lr=config.lr, betas=betas, eps=config.eps, fused=True)


def _lionw(groups: list[dict[str, Any]], config: OptimizerConfig) -> torch.optim.Optimizer:
    return LionW(groups, lr=config.lr, betas=(config.betas[0], config.betas[1]))


OPTIMIZERS = {"adamw": _adamw, "lionw": _lionw}
"""By the name in the configuration: (parameter groups, configuration) -> optimizer."""


def build_optimizer(model: Dbrx, config: OptimizerConfig) -> torch.optim.Optimizer:
    """The optimizer of ``config`` over ``parameter_groups``."""
    return OPTIMIZERS[config.name](parameter_groups(model, config), config)
