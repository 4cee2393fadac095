"""A program for tests: ranks that read the first, or with a state the next, 12 steps of numbered data.

dataset_ranks.py FOLDER [STATE], in the environment of a rank. Rank 0 prints the global batches as JSON.
"""

from __future__ import annotations

import itertools
import json
import os
import sys
from pathlib import Path
from typing import Any

import torch.distributed as dist
from numbered_data import dataset, steps

dist.init_process_group("gloo")
data = dataset(Path(sys.argv[1]))
if len(sys.argv) > 2:
    data.load_state_dict(json.loads(sys.argv[2]))
mine = steps(data, 12, workers=2)
everyone: list[Any] = [None] * dist.get_world_size()
dist.all_gather_object(everyone, mine)
if dist.get_rank() == 0:
    batches = [list(itertools.chain(*parts)) for parts in zip(*everyone, strict=True)]
    print(json.dumps(batches), flush=True)
dist.barrier()
os._exit(0)  # gloo's own farewell hangs now and then
