"""What a start of many ranks costs the store and the system: python scripts/start_counts.py [--ranks 3072]

The groups that a rank makes for a mesh, on a fake process group of 3,072 ranks; and what a group between all
ranks' CPUs (gloo's, which checkpoints agree by) takes of a rank, counted on real ones of 4 to 32 ranks, each
a thread of this process, which takes as many sockets and requests as a process would.
"""

from __future__ import annotations

import argparse
import os
import threading
import time
from collections import Counter
from datetime import timedelta
from typing import Any

import torch.distributed as dist
from torch.testing._internal.distributed.fake_pg import FakeStore

from dbrx_train.parallel import MeshShape
from dbrx_train.resilience.failure import _poll_seconds

STORES: Any = dist  # whose stubs do not know of its stores
MESHES = [(1, 3072, 1), (48, 64, 1), (48, 64, 8), (6, 512, 8)]


class CountingStore(STORES.Store):  # type: ignore[misc]
    """Another store, and how often it was asked for what."""

    def __init__(self, store: Any, asked: Counter[str]) -> None:
        super().__init__()
        self._store, self._asked = store, asked


def _forwarded(name: str) -> Any:
    def call(self: CountingStore, *args: Any) -> Any:
        self._asked[name] += 1
        return getattr(self._store, name)(*args)

    return call


for each in ("set", "get", "add", "check", "wait", "compare_set", "delete_key"):
    setattr(CountingStore, each, _forwarded(each))


def gloo(ranks: int) -> tuple[float, float]:
    """Sockets and requests to the store of each of so many ranks that make one group."""
    store, asked = STORES.HashStore(), Counter[str]()
    before, groups = len(os.listdir("/proc/self/fd")), list[Any]()

    def join(rank: int) -> None:
        counted = CountingStore(store, asked)
        groups.append(STORES.ProcessGroupGloo(counted, rank, ranks, timedelta(seconds=120)))

    threads = [threading.Thread(target=join, args=[rank]) for rank in range(ranks)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    # Each connection is a socket at either end, and a rank listens and waits on one or two more.
    return (len(os.listdir("/proc/self/fd")) - before) / ranks, asked.total() / ranks


def made(shape: MeshShape) -> tuple[list[int], float]:
    """Sizes of the groups that a rank of a mesh makes, and the seconds that it takes over that."""
    sizes, real = list[int](), dist.new_group

    def new_group(ranks: list[int], **options: Any) -> Any:
        sizes.append(len(ranks))
        return real(ranks, **options)

    ranks = shape.replicate * shape.shard
    dist.init_process_group("fake", store=FakeStore(), rank=ranks // 2, world_size=ranks)
    dist.new_group = new_group
    begin = time.perf_counter()
    try:
        shape.build("cpu", timedelta(seconds=60))
    finally:
        dist.new_group = real
        dist.destroy_process_group()
    return sizes, time.perf_counter() - begin


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--ranks", type=int, default=3072)
    ranks = parser.parse_args().ranks
    for axes in MESHES:
        shape = MeshShape(*axes)
        sizes, seconds = made(shape)
        every = sum(shape.replicate * shape.shard // size for size in sizes)
        print(f"mesh {axes}: a rank makes groups of {sizes}, of {every} that there are; {seconds:.2f} s")
    for few in (4, 8, 16, 32):
        sockets, asked = gloo(few)
        print(f"gloo, {few} ranks: {sockets:.1f} files and {asked:.1f} requests to the store, a rank")
    seconds = _poll_seconds(ranks)
    print(f"store, {ranks} ranks: asked by each every {seconds:.2f} s, {ranks / seconds:,.0f} a second")


if __name__ == "__main__":
    main()
