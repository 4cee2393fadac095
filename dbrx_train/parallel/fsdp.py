"""Fully sharded data parallelism (FSDP2) of a Dbrx, on plain torch.distributed.

Every block, the embedding and the head are units: a unit's parameters are gathered when it is run, and its
gradients scattered when its backward pass is over (arXiv 2304.11277).
"""

from __future__ import annotations

import itertools
from datetime import timedelta
from typing import Any

import torch
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.fsdp import CPUOffloadPolicy, FSDPModule, MixedPrecisionPolicy, fully_shard
from torch.distributed.tensor import DTensor, Shard, distribute_tensor

from dbrx_train.model.decoder import Block, Dbrx
from dbrx_train.model.init import draw_rows, is_norm
from dbrx_train.model.lora import ExpertFactors, factor_modules
from dbrx_train.model.moe.experts import Experts
from dbrx_train.parallel.expert_parallel import TokenDispatcher
from dbrx_train.parallel.mesh import Meshes, MeshShape, nearest_divisor
from dbrx_train.parallel.torch_patches import mend_fsdp_on_cpu

__all__ = ["init_shards", "parallelize"]


def parallelize(
    model: Dbrx,
    shape: MeshShape,
    *,
    device_type: str,
    seed: int | None,
    param_dtype: torch.dtype | None = None,
    reduce_dtype: torch.dtype = torch.float32,
    reshard_after_forward: bool = True,
    cpu_offload: bool = False,
    timeout: timedelta | None = None,
) -> None:
    """Shard ``model``, made under ``torch.device("meta")``, over a mesh of ``shape``, and draw its weights.

    The weights are those that one process would draw from ``seed``; each rank draws its own rows alone, and
    none where it is None.
    ``param_dtype`` is what the large matrices are gathered in, for use under autocast to it; norms, routers
    and the embedding, which autocast leaves in float32, stay so.
    ``reduce_dtype`` is what the large matrices' gradients are scattered and reduced in; all others' are in
    float32, as are the shards of all of them afterwards.
    ``reshard_after_forward`` frees a block's gathered parameters between its forward and backward pass.
    ``cpu_offload`` keeps shards, gradients and so optimizer state in the host's memory.
    ``timeout`` is after what time ranks give up waiting for each other; None: torch's default.

    Raises:
        ValueError: the model has weights already, or does not fit the mesh.
    """
    if not all(parameter.is_meta for parameter in model.parameters()):
        raise ValueError('model: has weights, which would be lost; make it under torch.device("meta")')
    shape.check(model.config)
    _check_adapters(model, shape)
    if device_type == "cpu":
        mend_fsdp_on_cpu()
    meshes = shape.build(device_type, timeout)
    place = _placement(cpu_offload, device_type)
    exact = place | {"mp_policy": MixedPrecisionPolicy(reduce_dtype=torch.float32)}
    policy = MixedPrecisionPolicy(param_dtype, reduce_dtype, cast_forward_inputs=False)
    lower = place | {"mp_policy": policy, "reshard_after_forward": reshard_after_forward}
    transformer, units = model.transformer, []
    fully_shard(transformer.wte, mesh=meshes.dense, **exact)
    # A look-up's gradient asks for no weights.
    transformer.wte.set_unshard_in_backward(False)  # type: ignore[operator]
    for block in transformer.blocks:
        inner: list[Any] = []
        if shape.expert > 1:
            _spread_experts(block.ffn.experts, meshes)
            if param_dtype is not None:
                for factors in _expert_factors(block):
                    inner.append(fully_shard(factors, mesh=meshes.experts, **exact))
            inner.append(fully_shard(block.ffn.experts, mesh=meshes.experts, **lower))
        if param_dtype is not None:
            # small, so they are kept until the backward pass
            for first, *others in _float32_parts(block, spread=shape.expert > 1):
                fully_shard([first, *others], mesh=meshes.dense, reshard_after_forward=False, **exact)
                inner.append(first)
        units.append([fully_shard(block, mesh=meshes.dense, **lower), *inner])
    fully_shard(transformer.norm_f, mesh=meshes.dense, **exact)
    # The head's backward pass follows at once, so it is kept; its product is all in the lower precision.
    head = MixedPrecisionPolicy(param_dtype, reduce_dtype)
    fully_shard(model.lm_head, mesh=meshes.dense, mp_policy=head, reshard_after_forward=False, **place)
    fully_shard(model, mesh=meshes.dense, **lower)
    _prefetch(units)
    model.to_empty(device=torch.device("cpu" if cpu_offload else device_type))
    for module in model.modules():
        for name, buffer in module.named_buffers(recurse=False):  # these are never offloaded
            setattr(module, name, buffer.to(device_type))
    if seed is not None:
        init_shards(model, seed)


def _check_adapters(model: Dbrx, shape: MeshShape) -> None:
    """Of spread experts, the rows of adapters too must divide over a group; ValueError if they do not."""
    if shape.expert == 1:
        return
    for name, parameter in model.named_parameters():
        if ".experts." in name and parameter.shape[0] % shape.shard:
            fitting = nearest_divisor(parameter.shape[0], shape.shard)
            raise ValueError(
                f"shard: {shape.shard} does not divide the {parameter.shape[0]} rows of {name}, which spread "
                f"experts need; use {fitting}, or another lora.rank"
            )


def _placement(cpu_offload: bool, device_type: str) -> dict[str, Any]:
    """Where shards lie between uses, as keywords of ``fully_shard``."""
    return {"offload_policy": CPUOffloadPolicy(pin_memory=device_type != "cpu")} if cpu_offload else {}


def _float32_parts(block: Block, *, spread: bool) -> list[list[nn.Module]]:
    """What is left in float32, in lists of modules that are always run together; not what is ``spread``."""
    router: list[nn.Module] = [] if block.ffn.router is None else [block.ffn.router]
    experts = _expert_factors(block)
    attention = [module for module in factor_modules(block) if module not in experts]
    norms: list[nn.Module] = [block.norm_attn_norm.norm_1, block.norm_attn_norm.norm_2]
    return [part for part in (norms, router, attention, [] if spread else experts) if part]


def _expert_factors(block: Block) -> list[nn.Module]:
    return [module for module in factor_modules(block) if isinstance(module, ExpertFactors)]


def _spread_experts(experts: Experts, meshes: Meshes) -> None:
    """Leave on each rank its own experts alone, and have tokens exchanged with the others."""
    assert meshes.expert is not None
    for module in experts.mlp.modules():
        for name, parameter in list(module.named_parameters(recurse=False)):
            spread = distribute_tensor(parameter.data, meshes.expert, [Shard(0)])
            module.register_parameter(name, nn.Parameter(spread, parameter.requires_grad))
    experts.token_dispatcher = TokenDispatcher(meshes.expert.get_group())


def _prefetch(units: list[list[Any]]) -> None:
    """Gather the next block with all its parts while one is run, in both directions."""
    assert all(isinstance(module, FSDPModule) for unit in units for module in unit)
    for here, following in itertools.pairwise(units):
        here[0].set_modules_to_forward_prefetch(following)
        following[0].set_modules_to_backward_prefetch(here)
    for _, *inner in units:
        for module in inner:
            # Itself, which does nothing: left to guess, FSDP goes by the order of forward passes, to which a
            # block that is computed again adds, and gathers what is not needed any more.
            module.set_modules_to_backward_prefetch([module])


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
    first, rows, mesh = 0, parameter.shape[0], parameter.device_mesh
    for axis in ("expert", "shard", "shard_outer"):  # the outermost cut first
        if axis in (mesh.mesh_dim_names or ()):
            part = -(-rows // _size(mesh, axis))
            begin = min(mesh.get_local_rank(axis) * part, rows)
            first, rows = first + begin, min(part, rows - begin)
    local = parameter.to_local()
    assert len(local) == rows
    return local, first


def _size(mesh: DeviceMesh, axis: str) -> int:
    assert mesh.mesh_dim_names is not None
    return mesh.size(mesh.mesh_dim_names.index(axis))
