"""Weights in 8 bits for generation and evaluation, where memory, not arithmetic, is what is short."""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn.utils import parametrize

from dbrx_train.model.decoder import Dbrx
from dbrx_train.model.moe.experts import GatedExperts
from dbrx_train.model.moe.router import Router

__all__ = ["quantize"]


class Int8Rows(nn.Module):
    """A matrix as integers of -127 to 127 with a scale for each row: W = q * scale (arXiv 2208.07339)."""

    def forward(self, q: Tensor, scale: Tensor) -> Tensor:
        return q * scale

    def right_inverse(self, weight: Tensor) -> tuple[Tensor, Tensor]:
        largest = weight.abs().amax(dim=1, keepdim=True).float()
        scale = (largest / 127).clamp(min=torch.finfo(torch.float32).tiny).to(weight.dtype)
        q = (weight.float() / scale.float()).round().clamp(-127, 127)  # a scale may be rounded down
        return q.to(torch.int8), scale


@torch.no_grad()
def quantize(model: Dbrx, input_ids: Tensor) -> float:
    """Turn all large matrices but the embedding into int8, for good; a quarter of float32's memory at rest.

    Each is turned back into its dtype whenever it is used, all experts of a layer at once. Norms and routers,
    which choose, stay as they are. The model can no longer be trained.

    Returns by how much the logits of ``input_ids`` [B, S] are off: the root mean square of the error, over
    that of the logits.
    """
    expected = model(input_ids).logits
    model.requires_grad_(False)
    routers = {id(module.layer) for module in model.modules() if isinstance(module, Router)}
    for module in list(model.modules()):
        names: tuple[str, ...] = ()
        if isinstance(module, GatedExperts):
            names = ("w1", "v1", "w2")
        elif isinstance(module, nn.Linear) and id(module) not in routers:
            names = ("weight",)
        for name in names:
            parametrize.register_parametrization(module, name, Int8Rows(), unsafe=True)
    assert expected is not None
    return float((model(input_ids).logits - expected).norm() / expected.norm())
