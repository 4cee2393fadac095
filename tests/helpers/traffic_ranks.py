"""A program for tests: the bytes that a step sends, counted, beside those that the formulas give.

torchrun --nproc-per-node N traffic_ranks.py CASES, where CASES is a JSON list of [replicate, shard, expert,
activation checkpointing, reshard after forward, bfloat16, innermost, reduce dtype]. Rank 0 prints a JSON list
of [counted, computed], each [gathered, scattered, reduced, exchanged], of all ranks together.
"""

from __future__ import annotations

import json
import sys
from collections import Counter
from typing import Any

import torch
import torch.distributed as dist
from parallel_ranks import CONFIG, tell
from torch.distributed.tensor.debug import CommDebugMode
from torch.utils._python_dispatch import TorchDispatchMode

from dbrx_train.model.decoder import Dbrx
from dbrx_train.parallel import MeshShape, checkpoint_activations, parallelize
from dbrx_train.plan.estimates import traffic

MICROBATCHES, BATCH, LENGTH = 2, 2, 8


class CountBytes(CommDebugMode):  # type: ignore[misc]
    """Bytes that this rank sends, by kind of collective."""

    def __init__(self) -> None:
        super().__init__()
        self.sent: Counter[str] = Counter()
        self.advanced_module_tracker.module_parents_dict[""] = set()

    # Its tracker of modules, which is not asked, loses its way where a block is computed again.
    def __enter__(self) -> Any:
        return TorchDispatchMode.__enter__(self)

    def __exit__(self, *error: Any) -> None:
        TorchDispatchMode.__exit__(self, *error)

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        before = sum(self.comm_counts.values())
        out = super().__torch_dispatch__(func, types, args, kwargs)
        if sum(self.comm_counts.values()) == before:
            return out
        name = func._overloadpacket.__name__
        if name == "_allgather_base_":
            whole, _, group = args[:3]
            self.add("gathered", whole, group, 1)
        elif name == "_reduce_scatter_base_":
            _, whole, group = args[:3]
            self.add("scattered", whole, group, 1)
        elif name == "allreduce_":
            (whole,), group = args[:2]
            self.add("reduced", whole, group, 2)
        elif name == "alltoall_base_":
            _, rows, group, _, splits = args[:5]
            ranks, me = dist.ProcessGroup.unbox(group).size(), dist.ProcessGroup.unbox(group).rank()
            splits = splits or [rows.shape[0] // ranks] * ranks
            away = sum(splits) - splits[me]
            self.sent["exchanged"] += away * rows[:1].nbytes if rows.shape[0] else 0
        else:
            raise AssertionError(f"a collective of another kind: {func}")
        return out

    def add(self, kind: str, whole: torch.Tensor, group: Any, times: int) -> None:
        ranks = dist.ProcessGroup.unbox(group).size()
        self.sent[kind] += times * whole.nbytes * (ranks - 1) // ranks


def case(
    replicate: int,
    shard: int,
    expert: int,
    recomputed: str,
    reshard: bool,
    bfloat16: bool,
    innermost: str,
    reduced: str,
) -> list[list[float]]:
    shape = MeshShape.of(
        dist.get_world_size(), replicate=replicate, shard=shard, expert=expert, innermost=innermost
    )
    reduce_dtype = getattr(torch, reduced)
    with torch.device("meta"):
        model = Dbrx(CONFIG)
    checkpoint_activations(model, recomputed)
    dtype = torch.bfloat16 if bfloat16 else None
    parallelize(
        model,
        shape,
        device_type="cpu",
        seed=0,
        param_dtype=dtype,
        reduce_dtype=reduce_dtype,
        reshard_after_forward=reshard,
    )
    generator = torch.Generator().manual_seed(dist.get_rank())
    away = 0
    with CountBytes() as count:
        for i in range(MICROBATCHES):
            model.set_requires_all_reduce(i + 1 == MICROBATCHES)  # type: ignore[operator]
            ids = torch.randint(CONFIG.vocab_size, (BATCH, LENGTH), generator=generator)
            with torch.autocast("cpu", torch.bfloat16, enabled=bfloat16):
                output = model(ids, labels=ids)
            assert output.loss is not None
            assert output.routing is not None
            output.loss.backward()
            load = output.routing.tokens_per_expert.view(CONFIG.n_layers, expert, -1).sum((0, 2))
            away += int(load.sum() - load[dist.get_rank() // shape.stride[0] % expert])
    expected = traffic(
        CONFIG,
        shape,
        microbatches=MICROBATCHES,
        tokens=BATCH * LENGTH,
        param_dtype=dtype,
        reduce_dtype=reduce_dtype,
        reshard_after_forward=reshard,
        activation_checkpointing=recomputed,
    )
    # The formula's experts are equally loaded; these are not.
    even = BATCH * LENGTH * MICROBATCHES * CONFIG.n_layers * CONFIG.top_k * (expert - 1) / expert
    ways = 5 if recomputed in ("full", "selective") else 4
    width = (CONFIG.d_model * ways + 2) * (2 if bfloat16 else 4)
    exchanged = expected.exchanged + (away - even) * width
    kinds = ("gathered", "scattered", "reduced", "exchanged")
    both = torch.tensor(
        [
            [count.sent[kind] for kind in kinds],
            [expected.gathered, expected.scattered, expected.reduced, exchanged],
        ],
        dtype=torch.float64,
    )
    dist.all_reduce(both)
    result: list[list[float]] = both.tolist()
    return result


if __name__ == "__main__":
    dist.init_process_group("gloo")
    found = [case(*arguments) for arguments in json.loads(sys.argv[1])]
    tell(found)
