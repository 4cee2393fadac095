"""A program for tests: each rank reads its own rows of weights at rest, and all hear of what one finds.

torchrun --nproc-per-node N weights_ranks.py JOBS: a JSON list of [PATH, MODEL, EXPERT, UPCYCLE], which are
weights, options of the model that they are for, ranks that share its experts, and whether to upcycle. Rank 0
prints a JSON list with, for each job, what is not as one process has it, the bytes that each rank read and
those of its own rows, or what each rank says is wrong.
"""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from parallel_ranks import tell, whole
from torch import Tensor

from dbrx_train.checkpoint.weights import open_weights, read_together, upcycled
from dbrx_train.model.config import DbrxConfig
from dbrx_train.model.decoder import Dbrx
from dbrx_train.model.hf.files import Stored
from dbrx_train.model.hf.names import Part
from dbrx_train.parallel import MeshShape, parallelize

read_bytes = [0]
check = Stored._check_finite


def counted(self: Stored, part: Part, values: Tensor) -> None:
    read_bytes[0] += values.nbytes
    check(self, part, values)


def load(path: str, options: dict[str, Any], expert: int, upcycle: bool) -> dict[str, Any]:
    config = DbrxConfig.from_dict(options)
    weights = open_weights(Path(path), print)
    weights = upcycled(weights, config) if upcycle else weights
    with torch.device("meta"):
        model = Dbrx(config)
    parallelize(model, MeshShape.of(dist.get_world_size(), expert=expert), device_type="cpu", seed=5)
    read_bytes[0], said = 0, None
    try:
        read_together(weights, model)
    except ValueError as error:
        said = str(error)
    share = sum(p.to_local().nbytes for p in model.parameters())
    ranks = [(read_bytes[0], share, said)] * dist.get_world_size()
    dist.all_gather_object(ranks, ranks[0])
    if said is not None:
        return {"said": [each[2] for each in ranks]}
    alone = Dbrx(config, seed=5)
    weights.read(alone.state_dict())
    pairs = zip(model.state_dict().items(), alone.state_dict().values(), strict=True)
    wrong = [name for (name, ours), wanted in pairs if not torch.equal(whole(ours), wanted)]
    return {"wrong": wrong, "read": [each[0] for each in ranks], "share": [each[1] for each in ranks]}


if __name__ == "__main__":
    Stored._check_finite = counted  # type: ignore[method-assign]
    dist.init_process_group("gloo")
    found = [load(*job) for job in json.loads(sys.argv[1])]
    tell(found)
