"""A program for tests: one rank of a sharded model, held against the same model in one process.

torchrun --nproc-per-node N parallel_ranks.py MESHES, where MESHES is a JSON list of [replicate, shard,
expert, innermost]. Rank 0 prints a JSON list of what differs, relatively, for each of KINDS on each.
On CPUs over gloo, unless the environment's DEVICE is cuda: then on GPUs over NCCL.
"""

from __future__ import annotations

import json
import os
import sys
from dataclasses import replace
from typing import Any, NoReturn

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed.tensor import DTensor

from dbrx_train.config import OptimizerConfig
from dbrx_train.model.config import ACTIVATION_CHECKPOINTING, DbrxConfig
from dbrx_train.model.decoder import Dbrx
from dbrx_train.parallel import (
    GlobalBatchLoad,
    MeshShape,
    checkpoint_activations,
    clip_grad_norm,
    parallelize,
)
from dbrx_train.parallel.grad_norm import group_norms
from dbrx_train.train.optim import build_optimizer

# Sizes that no number of ranks divides, and more experts than the few tokens visit.
CONFIG = DbrxConfig(
    d_model=24,
    n_layers=2,
    n_heads=6,
    n_kv_heads=3,
    ffn_hidden_size=17,
    vocab_size=101,
    max_seq_len=32,
    num_experts=32,
    top_k=2,
    balance_loss_weight=0.0,
    init_std=0.2,
)
STEPS, BATCH, LENGTH = 2, 8, 5
DEVICE = os.environ.get("DEVICE", "cpu")
# "bfloat16": what is gathered, and on every other mesh what is reduced.
# "balance": the loss that evens out the global batch's load, which one process sees at once.
KINDS = ("adamw", "lionw", "bfloat16", "balance")


def tell(found: Any) -> NoReturn:
    """The end of such a program: rank 0 prints what was found, as JSON, and all exit."""
    if dist.get_rank() == 0:
        print(json.dumps(found), flush=True)
    dist.barrier()
    os._exit(0)  # gloo's own farewell hangs now and then


def whole(tensor: Tensor) -> Tensor:
    if not isinstance(tensor, DTensor):
        return tensor
    there = tensor.to(DEVICE)  # an offloaded one cannot be gathered where it lies
    assert isinstance(there, DTensor)
    return there.full_tensor()


def apart(a: Tensor, b: Tensor) -> float:
    a, b = whole(a).cpu(), b.cpu()
    return float((a - b).abs().max() / b.abs().max().clamp(min=1e-12))


def backward(model: Dbrx, samples: Tensor, labels: Tensor, count: float, dtype: torch.dtype | None) -> Tensor:
    """Gradients of the loss summed over labels, divided by ``count``; returns that loss."""
    with torch.autocast(DEVICE, dtype=dtype or torch.bfloat16, enabled=dtype is not None):
        output = model(samples, labels=labels)
    assert output.loss is not None
    assert output.num_labels is not None
    loss = output.loss * (output.num_labels / count)
    loss.backward()
    return loss.detach()


def norms_by_group(model: Dbrx) -> dict[str, float]:
    groups: dict[str, list[Tensor]] = {}
    for name, parameter in model.named_parameters():
        part = "experts" if ".experts." in name else "rest"
        assert parameter.grad is not None
        groups.setdefault(f"{part}'s weights", []).append(parameter)
        groups.setdefault(f"{part}'s gradients", []).append(parameter.grad)
    return group_norms(groups)


def compare(shape: MeshShape, kind: str, checkpointing: str, reduced: torch.dtype) -> dict[str, Any]:
    rank, ranks = dist.get_rank(), dist.get_world_size()
    balanced, dtype = kind == "balance", torch.bfloat16 if kind == "bfloat16" else None
    model_config = replace(CONFIG, balance_loss_weight=0.5 if balanced else 0.0)
    with torch.device("meta"):
        sharded = Dbrx(model_config)
    checkpoint_activations(sharded, checkpointing)
    parallelize(
        sharded,
        shape,
        device_type=DEVICE,
        seed=3,
        param_dtype=dtype,
        reduce_dtype=torch.float32 if dtype is None else reduced,
        cpu_offload=balanced,
    )
    alone = Dbrx(model_config, seed=3).to(DEVICE)
    if balanced:
        sharded.batch_load = GlobalBatchLoad()
    names = [name for name, _ in alone.named_parameters()]
    pairs = list(zip(names, sharded.parameters(), alone.parameters(), strict=True))
    result: dict[str, Any] = {"kind": kind, "initial": max(apart(p, q) for _, p, q in pairs)}
    lion = kind == "lionw"
    config = OptimizerConfig(name="lionw" if lion else "adamw", lr=1e-4 if lion else 1e-2, eps=1e-4)
    optimizers = [build_optimizer(model, config) for model in (sharded, alone)]
    tokens = torch.randint(101, (STEPS, BATCH, LENGTH), generator=torch.Generator().manual_seed(0)).to(DEVICE)
    for step, batch in enumerate(tokens):
        labels = batch.clone()
        if not balanced:
            labels[: BATCH // 4, 2:] = -100  # the first rank has fewer labels than the last
        count = (labels[:, 1:] >= 0).sum().item()
        mine, wanted = (t.view(ranks, -1, LENGTH)[rank] for t in (batch, labels))
        # Microbatches on every rank; FSDP averages over ranks, so each rank's share counts ranks-fold.
        pieces = 1 if balanced else 2
        parts = list(zip(mine.chunk(pieces), wanted.chunk(pieces), strict=True))
        loss = torch.zeros((), device=DEVICE)
        for i, (x, y) in enumerate(parts, 1):
            sharded.set_requires_all_reduce(i == len(parts))  # type: ignore[operator]
            loss += backward(sharded, x, y, count / ranks, dtype)
        if sharded.batch_load is not None:
            sharded.batch_load.begin()  # type: ignore[attr-defined]
        dist.all_reduce(loss)
        expected = backward(alone, batch, labels, count, dtype)
        by_group = [norms_by_group(model) for model in (sharded, alone)]
        result[f"norms {step}"] = max(
            abs(a / b - 1) for a, b in zip(*map(dict.values, by_group), strict=True)
        )
        norms = [clip_grad_norm(model.parameters(), 0.5) for model in (sharded, alone)]
        if step == 0:
            grads = {name: (p.grad, q.grad) for name, p, q in pairs}
            result["gradients"] = {name: apart(p, q) for name, (p, q) in grads.items()}
            with torch.no_grad():
                routing = alone(batch).routing
            assert routing is not None
            result["unvisited"] = int((routing.tokens_per_expert == 0).sum())
        result[f"loss {step}"] = float((loss / ranks - expected).abs() / expected)
        result[f"norm {step}"] = float((norms[0] - norms[1]).abs() / norms[1])
        for each in optimizers:
            each.step()
            each.zero_grad()
    result["weights"] = max(apart(p, q) for _, p, q in pairs)
    share = sum(p.to_local().numel() for p in sharded.parameters())
    result["share"] = share / sum(q.numel() for q in alone.parameters())
    return result


if __name__ == "__main__":
    dist.init_process_group("gloo" if DEVICE == "cpu" else "nccl")
    found = []
    for i, (replicate, shard, expert, innermost) in enumerate(json.loads(sys.argv[1])):
        shape = MeshShape.of(
            dist.get_world_size(), replicate=replicate, shard=shard, expert=expert, innermost=innermost
        )
        reduced = torch.bfloat16 if i % 2 else torch.float32
        for j, kind in enumerate(KINDS):
            recomputed = ACTIVATION_CHECKPOINTING[(i + j) % len(ACTIVATION_CHECKPOINTING)]
            found.append(compare(shape, kind, recomputed, reduced))
    tell(found)
