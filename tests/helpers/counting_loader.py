"""A program for tests: counts the batches of numbered data as they come, until it is killed.

counting_loader.py CACHE REMOTE
"""

from __future__ import annotations

import sys

from numbered_data import POINTS, equal_steps

from dbrx_train.data.mix.schedule import MixSchedule
from dbrx_train.data.stream.dataset import ScheduledDataset
from dbrx_train.data.stream.loader import build_loader
from dbrx_train.data.stream.shards import Source

cache, remote = sys.argv[1:]
sources = {n: Source(f"{cache}/{n}", remote=f"{remote}/{n}") for n in "abc"}
data = ScheduledDataset(sources, MixSchedule(POINTS, canonical_nodes=2), equal_steps())
for number, _ in enumerate(build_loader(data, eos_id=0, pad_id=0, num_workers=2, endless=True)):
    print(number, flush=True)
