"""The norm of gradients that lie on more than one mesh."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.tensor import DTensor
from torch.nn.utils import clip_grads_with_norm_, get_total_norm

__all__ = ["clip_grad_norm"]


@torch.no_grad()
def clip_grad_norm(parameters: Iterable[nn.Parameter], max_norm: float) -> Tensor:
    """Scale all gradients so that their L2 norm together is at most ``max_norm``; returns what it was.

    As ``torch.nn.utils.clip_grad_norm_``, which cannot stack norms of different meshes (those of experts and
    of the rest, under expert parallelism).
    """
    by_mesh: dict[DeviceMesh | None, list[nn.Parameter]] = {}
    for parameter in parameters:
        if parameter.grad is not None:
            mesh = parameter.grad.device_mesh if isinstance(parameter.grad, DTensor) else None
            by_mesh.setdefault(mesh, []).append(parameter)
    norms = []
    for members in by_mesh.values():
        norm = get_total_norm([p.grad for p in members if p.grad is not None])
        if isinstance(norm, DTensor):  # of offloaded gradients on a CPU, whose group is of the devices
            there: Any = norm.to(norm.device_mesh.device_type)
            norm = there.full_tensor()
        norms.append(norm)
    if not norms:
        return torch.zeros(())
    total: Tensor = torch.linalg.vector_norm(torch.stack(norms))
    for members in by_mesh.values():
        clip_grads_with_norm_(members, max_norm, total)
    return total
