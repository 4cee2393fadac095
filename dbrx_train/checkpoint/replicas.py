"""A checkpoint read by one replica, which the others have it from (HSDP).

An object store is then asked for every byte once, however many replicas there are; between them bytes take
the way that gradients take.
"""

from __future__ import annotations

from collections.abc import Iterable

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed.tensor import DTensor

from dbrx_train.checkpoint.tensors import Reader

__all__ = ["read_once", "replica_group"]


def replica_group(tensors: Iterable[Tensor]) -> dist.ProcessGroup | None:
    """The ranks that hold the same parts of ``tensors`` as this one; None if no other does."""
    for tensor in tensors:
        if isinstance(tensor, DTensor) and "replicate" in (tensor.device_mesh.mesh_dim_names or ()):
            return tensor.device_mesh.get_group("replicate")
    return None


@torch.no_grad()
def read_once(reader: Reader, tensors: dict[str, Tensor], group: dist.ProcessGroup | None) -> None:
    """Fill ``tensors``, which all ranks of ``group`` hold alike: its first reads, the others hear of it.

    Raises:
        ValueError: on the first, as ``Reader.read``.
    """
    if group is None or group.rank() == 0:
        reader.read(tensors)
    if group is None:
        return
    first = dist.get_global_rank(group, 0)
    on_gpu = dist.get_backend(group) == "nccl"
    for tensor in tensors.values():
        local = tensor.to_local() if isinstance(tensor, DTensor) else tensor
        there = local.cuda() if on_gpu else local  # the same, if it lies there
        dist.broadcast(there, first, group)
        if there is not local:
            local.copy_(there)
