"""Norms of gradients and of groups of tensors, which may lie on more than one mesh."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.tensor import DTensor
from torch.nn.utils import clip_grads_with_norm_, get_total_norm

__all__ = ["clip_grad_norm", "group_norms"]


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
    for mesh, members in by_mesh.items():
        grads = [p.grad for p in members if p.grad is not None]
        if mesh is not None and grads[0].device.type != mesh.device_type:
            norms.append(_offloaded_norm(grads, mesh))
            continue
        norm = get_total_norm(grads)
        norms.append(norm.full_tensor() if isinstance(norm, DTensor) else norm)
    if not norms:
        return torch.zeros(())
    total: Tensor = torch.linalg.vector_norm(torch.stack(norms))
    for members in by_mesh.values():
        clip_grads_with_norm_(members, max_norm, total)
    return total


def _offloaded_norm(grads: list[Tensor], mesh: DeviceMesh) -> Tensor:
    """Of gradients on the CPU whose mesh is of devices, which alone have a way to each other."""
    parts = torch.stack([_square_sum(grad) for grad in grads]).sum()
    square = parts.float().to(mesh.device_type)
    for axis in range(mesh.ndim):
        dist.all_reduce(square, group=mesh.get_group(axis))
    return square.sqrt()


@torch.no_grad()
def group_norms(groups: Mapping[str, Iterable[Tensor]]) -> dict[str, float]:
    """The L2 norm of each group, the same on every rank: one reduction for all of them.

    Every rank of the world must call it, with the same groups. What several ranks hold alike counts once.
    """
    members = {name: list(tensors) for name, tensors in groups.items()}
    tensors = [tensor for group in members.values() for tensor in group]
    if not tensors:
        return dict.fromkeys(members, 0.0)
    first = tensors[0]
    # An offloaded shard lies on the CPU, where its mesh's ranks may have no way to each other.
    device = first.device_mesh.device_type if isinstance(first, DTensor) else first.device
    squares = torch.zeros(len(members), dtype=torch.float64, device=device)
    for i, group in enumerate(members.values()):
        if group:
            squares[i] = torch.stack([_square_sum(tensor) for tensor in group]).sum().to(device)
    if dist.is_initialized():
        dist.all_reduce(squares)
    return dict(zip(members, squares.sqrt().tolist(), strict=True))


def _square_sum(tensor: Tensor) -> Tensor:
    """Of this rank's part, divided by how many ranks hold the same; float64."""
    local, copies = tensor, dist.get_world_size() if dist.is_initialized() else 1
    if isinstance(tensor, DTensor):
        mesh = tensor.device_mesh
        local = tensor.to_local()
        axes = (mesh.size(axis) for axis, place in enumerate(tensor.placements) if place.is_replicate())
        copies = math.prod(axes)
    norm: Tensor = torch.linalg.vector_norm(local, dtype=torch.float32)
    return norm.double().square() / copies
