"""A program for tests: checkpoints of one mesh read on another.

torchrun --nproc-per-node N checkpoint_ranks.py save|read FOLDER MESHES, where MESHES is a JSON list of
[replicate, shard, expert]. "save" writes FOLDER/N-i for each mesh, once directly and once from staged copies
after the tensors changed. "read" reads the checkpoints in FOLDER on each mesh; rank 0 prints a JSON list of
what is not bit for bit what was saved.
"""

from __future__ import annotations

import json
import sys
from pathlib import Path

import torch
import torch.distributed as dist
from parallel_ranks import CONFIG, tell, whole
from torch import Tensor
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor import DTensor, Shard, distribute_tensor

from dbrx_train.checkpoint.replicas import read_once, replica_group
from dbrx_train.checkpoint.tensors import Reader, Staging, model_tensors, optimizer_tensors, own_share, write
from dbrx_train.config import OptimizerConfig
from dbrx_train.model.decoder import Dbrx
from dbrx_train.parallel import MeshShape, parallelize
from dbrx_train.parallel.fsdp import local_rows
from dbrx_train.train.optim import build_optimizer

CONFIG.loss_free_bias_rate = 0.01


def content(mesh: list[int]) -> dict[str, Tensor]:
    with torch.device("meta"):
        model = Dbrx(CONFIG)
    replicate, shard, expert = mesh
    shape = MeshShape.of(dist.get_world_size(), replicate=replicate, shard=shard, expert=expert)
    parallelize(model, shape, device_type="cpu", seed=3)
    optimizer = build_optimizer(model, OptimizerConfig())
    with torch.no_grad():  # leaves the head gathered
        model(torch.zeros(1, 4, dtype=torch.long))
    # Of two rows, so that some ranks hold none.
    everyone = init_device_mesh("cpu", (dist.get_world_size(),), mesh_dim_names=("shard",))
    few = {"few": distribute_tensor(torch.zeros(2, 3), everyone, [Shard(0)])}
    return few | model_tensors(model) | optimizer_tensors(model, optimizer)


def expected(name: str, tensor: Tensor) -> Tensor:
    """What a tensor is saved as, whole: random numbers that depend on its name alone."""
    seed = int.from_bytes(name.encode(), "big") % 2**40
    return torch.randn(tuple(tensor.shape), generator=torch.Generator().manual_seed(seed))


def fill(tensors: dict[str, Tensor]) -> None:
    for name, tensor in tensors.items():
        local, first = local_rows(tensor.detach())
        values = expected(name, tensor)
        local.copy_(values[first : first + len(local)] if isinstance(tensor, DTensor) else values)


def save_all(folder: Path, meshes: list[list[int]]) -> None:
    for i, mesh in enumerate(meshes):
        tensors, name = content(mesh), f"{dist.get_world_size()}-{i}"
        fill(tensors)
        share = own_share(tensors)
        copies = Staging().copy(share)
        write(folder / name, share, None)
        for tensor in tensors.values():
            local_rows(tensor.detach())[0].zero_()
        write(folder / f"{name}-staged", copies, None)


def read_all(folder: Path, meshes: list[list[int]]) -> list[str]:
    wrong = []
    for i, mesh in enumerate(meshes):
        tensors = content(mesh)
        for checkpoint in sorted(folder.iterdir()):
            if i and checkpoint.name.endswith("-staged"):
                continue  # the same bytes by another way; one mesh of each size has read them
            for tensor in tensors.values():
                local_rows(tensor.detach())[0].zero_()
            fetched: list[str] = []
            reader, group = Reader(checkpoint, fetched.append), replica_group(tensors.values())
            read_once(reader, {name: t for name, t in tensors.items() if name != "few"}, group)
            if group is not None and group.rank() > 0 and fetched:
                wrong.append(f"a replica fetched {fetched}")
            reader.read({"few": tensors["few"]})
            for name, tensor in tensors.items():
                if not torch.equal(whole(tensor.detach()), expected(name, tensor)):
                    wrong.append(f"{name} of {checkpoint.name} on {dist.get_world_size()}-{i}")
    return wrong


if __name__ == "__main__":
    dist.init_process_group("gloo")
    folder, meshes = Path(sys.argv[2]), json.loads(sys.argv[3])
    tell(save_all(folder, meshes) if sys.argv[1] == "save" else read_all(folder, meshes))
