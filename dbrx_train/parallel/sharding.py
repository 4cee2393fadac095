"""Fully sharded data parallelism (FSDP2) of a Dbrx, on plain torch.distributed.

Every block, the embedding and the head with its norm are units of their own: a unit's parameters are gathered
when it is run, and its gradients scattered when its backward pass is over (arXiv 2304.11277).
"""

from __future__ import annotations

import itertools
from typing import Any

import torch
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.fsdp import FSDPModule, MixedPrecisionPolicy, fully_shard
from torch.distributed.tensor import DTensor, Shard, distribute_tensor
from torch.distributed.tensor._utils import compute_local_shape_and_global_offset

from dbrx_train.model.decoder import Dbrx
from dbrx_train.model.experts import Experts
from dbrx_train.model.init import draw_rows, is_norm
from dbrx_train.parallel.expert_parallel import TokenExchange
from dbrx_train.parallel.gloo import mend_fsdp_on_cpu

__all__ = ["init_shards", "parallelize"]


def parallelize(
    model: Dbrx,
    mesh: DeviceMesh,
    *,
    seed: int,
    param_dtype: torch.dtype | None = None,
    reshard_after_forward: bool = True,
) -> None:
    """Shard ``model``, made under ``torch.device("meta")``, over ``mesh``, and draw its weights.

    ``mesh`` is that of ``MeshShape.build``. The weights are those that one process would draw from ``seed``;
    each rank draws its own rows alone. ``param_dtype`` is what parameters are gathered and computed in;
    gradients are reduced in float32 in any case. ``reshard_after_forward`` frees a block's gathered
    parameters between its forward and backward pass.
    """
    if mesh.device_type == "cpu":
        mend_fsdp_on_cpu()
    policy = MixedPrecisionPolicy(param_dtype=param_dtype, reduce_dtype=torch.float32)
    replicas = ("replicate",) if mesh["replicate"].size() > 1 else ()
    options: dict[str, Any] = {"mesh": mesh[(*replicas, "shard")], "mp_policy": policy}
    transformer = model.transformer
    fully_shard(transformer.wte, **options, reshard_after_forward=reshard_after_forward)
    for block in transformer.blocks:
        if mesh["expert"].size() > 1:
            _spread_experts(block.ffn.experts, mesh["expert"])
            over = options | {"mesh": mesh[(*replicas, "shard_outer")]}
            fully_shard(block.ffn.experts, **over, reshard_after_forward=reshard_after_forward)
        fully_shard(block, **options, reshard_after_forward=reshard_after_forward)
    # The head runs last and its backward pass first: what it gathered is needed again at once.
    head: list[nn.Module] = [transformer.norm_f, model.lm_head]
    fully_shard(head, **options, reshard_after_forward=False)
    fully_shard(model, **options, reshard_after_forward=reshard_after_forward)
    _prefetch(list(transformer.blocks))
    model.to_empty(device=torch.device(mesh.device_type))
    init_shards(model, seed)


def _spread_experts(experts: Experts, mesh: DeviceMesh) -> None:
    """Leave on each rank of ``mesh`` its experts alone, and have tokens exchanged with the others."""
    for name, parameter in list(experts.mlp.named_parameters()):
        spread = distribute_tensor(parameter.data, mesh, [Shard(0)])
        experts.mlp.register_parameter(name, nn.Parameter(spread))
    experts.exchange = TokenExchange(mesh.get_group())


def _prefetch(blocks: list[nn.Module]) -> None:
    """Gather the next block while one is run, in both directions."""
    for here, following in itertools.pairwise(blocks):
        assert isinstance(here, FSDPModule)
        assert isinstance(following, FSDPModule)
        here.set_modules_to_forward_prefetch([following])
        following.set_modules_to_backward_prefetch([here])


@torch.no_grad()
def init_shards(model: Dbrx, seed: int) -> None:
    """Draw the weights of a sharded model: on every rank the rows of its own shards, as one process would."""
    for name, parameter in model.named_parameters():
        local, first = local_rows(parameter)
        if is_norm(name):
            local.fill_(1.0)
        elif len(local):
            shape = (parameter.shape[0], parameter.shape[1])
            local.copy_(draw_rows(name, model.config, seed, shape, first, first + len(local)))
    for buffer in model.buffers():  # the routers' selection biases
        buffer.zero_()


def local_rows(parameter: Tensor) -> tuple[Tensor, int]:
    """This rank's part of a parameter that is sharded by rows, and its first row."""
    if not isinstance(parameter, DTensor):
        return parameter, 0
    _, offset = compute_local_shape_and_global_offset(
        parameter.shape, parameter.device_mesh, parameter.placements
    )
    return parameter.to_local(), offset[0]
