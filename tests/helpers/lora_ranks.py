"""A program for tests: adapters of a sharded model, held against the same in one process.

torchrun --nproc-per-node N lora_ranks.py MESHES, where MESHES is a JSON list of [replicate, shard, expert].
Rank 0 prints a JSON list of what differs, relatively, on each mesh.
"""

from __future__ import annotations

import json
import sys
import tempfile
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from parallel_ranks import CONFIG, apart, backward, tell, whole

from dbrx_train.checkpoint.tensors import Reader, model_tensors, write
from dbrx_train.config import OptimizerConfig
from dbrx_train.model.decoder import Dbrx
from dbrx_train.model.lora import apply_lora, cast_frozen, is_factor
from dbrx_train.parallel import MeshShape, checkpoint_activations, parallelize
from dbrx_train.train.optim import build_optimizer


def compare(mesh: list[int], dtype: torch.dtype | None) -> dict[str, Any]:
    rank, ranks = dist.get_rank(), dist.get_world_size()
    replicate, shard, expert = mesh
    shape = MeshShape.of(ranks, replicate=replicate, shard=shard, expert=expert)
    with torch.device("meta"):
        sharded = Dbrx(CONFIG)
    alone = Dbrx(CONFIG, seed=3)
    for model in (sharded, alone):
        apply_lora(model, 2, 4.0, seed=3)
        if dtype is not None:
            cast_frozen(model, dtype)
    if dtype is not None:
        checkpoint_activations(sharded, "full")
    parallelize(sharded, shape, device_type="cpu", seed=3, param_dtype=dtype)
    names = [name for name, _ in alone.named_parameters()]
    pairs = list(zip(names, sharded.parameters(), alone.parameters(), strict=True))
    result: dict[str, Any] = {"mesh": mesh, "initial": max(apart(p, q) for _, p, q in pairs)}
    optimizers = [build_optimizer(model, OptimizerConfig(lr=1e-2, eps=1e-4)) for model in (sharded, alone)]
    frozen = {name: whole(p).clone() for name, p, _ in pairs if not is_factor(name)}
    # Not 0: one of its tokens has two experts nearly alike, and bfloat16 may decide otherwise on other ranks.
    tokens = torch.randint(101, (2, 8, 5), generator=torch.Generator().manual_seed(2))
    for batch in tokens:
        count = batch[:, 1:].numel()
        mine = batch.view(ranks, -1, 5)[rank]
        backward(sharded, mine, mine, count / ranks, dtype)
        backward(alone, batch, batch, count, dtype)
        trained = [(name, p, q) for name, p, q in pairs if is_factor(name)]
        result["gradients"] = {name: apart(p.grad, q.grad) for name, p, q in trained}
        for each in optimizers:
            each.step()
            each.zero_grad()
    result["weights"] = max(apart(p, q) for _, p, q in pairs)
    result["frozen"] = max(float((whole(p) != frozen[n]).sum()) for n, p, _ in pairs if n in frozen)
    result["read"] = read_back(sharded)
    return result


def read_back(model: Dbrx) -> float:
    """Elements that another reading of what was saved has otherwise."""
    folders = [tempfile.mkdtemp() if dist.get_rank() == 0 else ""]
    dist.broadcast_object_list(folders)
    tensors = model_tensors(model)
    before = {name: whole(tensor).clone() for name, tensor in tensors.items()}
    write(Path(folders[0]), tensors, None)
    for tensor in tensors.values():
        tensor.detach().zero_()
    Reader(Path(folders[0])).read(tensors)
    return max(float((whole(tensor) != before[name]).sum()) for name, tensor in tensors.items())


if __name__ == "__main__":
    dist.init_process_group("gloo")
    found = [compare(mesh, dtype) for mesh in json.loads(sys.argv[1]) for dtype in (None, torch.bfloat16)]
    tell(found)
