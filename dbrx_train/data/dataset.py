"""The scheduled mix as a dataset: every rank and worker finds its samples of any step by arithmetic alone.

**Layout.** The global batch of a step is C = ``canonical_nodes`` slices of equal size. Canonical node c runs
the schedule on its own part of every source and fills slice c, so the samples of a step depend on the step
alone, never on the number of ranks. Rank r of R takes the r-th of R equal slices of each global batch, and
worker w of W every W-th batch of its rank (which is how a DataLoader collects them).

**State.** A position, counted in samples of the whole run, says all about progress. The state adds what has
to be the same for it to mean the same: the schedule followed so far, the seed, the data's fingerprints.

The dataset has no end and so no length: past its last point the schedule holds its weights. A run is one
epoch for the trainer, however often it goes through its sources.
"""

from __future__ import annotations

import itertools
from collections import Counter, deque
from collections.abc import Iterator, Mapping
from concurrent.futures import Future, ThreadPoolExecutor
from typing import Any

import numpy as np
from streaming.base.distributed import get_rank, get_world_size
from torch.utils.data import Dataset, IterableDataset, get_worker_info

from dbrx_train.data.apportion import Ints
from dbrx_train.data.mix import MixSchedule
from dbrx_train.data.shards import DataError, ShardCache, ShardStore, Source
from dbrx_train.data.shuffle import SourceOrder

__all__ = ["EvalDataset", "ScheduledDataset"]

Sample = dict[str, Any]

_WINDOW = 8192
"""Samples of a canonical node that are planned at a time."""


class ScheduledDataset(IterableDataset[Sample]):
    """Samples ``{"tokens": int64 [seq_len], "source": int, "sample_id": int}`` in the schedule's order.

    ``source`` counts in ``schedule.sources``; ``sample_id`` is the sample's number within its source. Wrap it
    in a DataLoader with ``batch_size=dataset.rank_batch_size``.
    """

    def __init__(
        self,
        sources: Mapping[str, Source],
        schedule: MixSchedule,
        *,
        seq_len: int,
        global_batch_size: int,
        shuffle: bool = True,
        shuffle_seed: int = 0,
        shuffle_block_size: int = 1 << 18,
        predownload: int | None = None,
        cache_limit: int | None = None,
        rank: int | None = None,
        world_size: int | None = None,
    ) -> None:
        """Read the sources' indexes; no sample is read yet.

        ``predownload`` is how many samples ahead of the one in use a worker has shards made ready (default:
        eight batches); ``cache_limit`` bounds in bytes what the sources keep locally that can be had again
        (None: no bound). Raises ValueError for a source that is unknown, missing or too small, or sizes that
        are negative or do not divide. Iterating raises DataError, a ValueError of one line, for bad data.
        """
        self.rank = get_rank() if rank is None else rank
        self.world_size = get_world_size() if world_size is None else world_size
        for parts, what in ((self.world_size, "ranks"), (schedule.canonical_nodes, "canonical nodes")):
            if global_batch_size < 1 or global_batch_size % parts:
                raise ValueError(
                    f"global_batch_size: {global_batch_size} is no multiple of the {parts} {what}"
                )
        for field, value in (("predownload", predownload), ("cache_limit", cache_limit)):
            if value is not None and value < 0:
                raise ValueError(f"{field}: {value} is negative; use 0 or more, or leave it out")
        if missing := set(schedule.sources) - set(sources):
            raise ValueError(f"mix: {min(missing)} is no source; use {', '.join(sources)}")
        self.schedule = self._asked = schedule
        self.seq_len = seq_len
        self.global_batch_size = global_batch_size
        self.rank_batch_size = global_batch_size // self.world_size
        self.predownload = 8 * self.rank_batch_size if predownload is None else predownload
        self.position = 0
        self._shuffling: dict[str, Any] = {
            "shuffle": shuffle,
            "shuffle_seed": shuffle_seed,
            "shuffle_block_size": shuffle_block_size,
        }
        self._stores = {name: ShardStore(name, sources[name]) for name in schedule.sources}
        nodes = schedule.canonical_nodes
        self._orders = {
            name: SourceOrder(name, store.samples_per_shard, canonical_nodes=nodes, **self._shuffling)
            for name, store in self._stores.items()
        }
        stores = list(self._stores.values())
        self._cache = None if cache_limit is None else ShardCache(stores, cache_limit)

    @property
    def sizes(self) -> dict[str, int]:
        """Samples in each source."""
        return {name: int(store.samples_per_shard.sum()) for name, store in self._stores.items()}

    def __iter__(self) -> Iterator[Sample]:
        """This worker's samples from ``position`` on, while a thread prepares the shards of those ahead."""
        if self._cache is not None:
            self._cache.shrink()  # an earlier run may have kept more
        worker = get_worker_info()
        addresses = self._addresses(*((worker.id, worker.num_workers) if worker else (0, 1)))
        stores = [self._stores[name] for name in self.schedule.sources]
        ahead: deque[tuple[int, int, int]] = deque()
        ready: dict[tuple[int, int], Future[None]] = {}
        uses: Counter[tuple[int, int]] = Counter()
        pool = ThreadPoolExecutor(1, "prefetch")
        try:
            while True:
                while len(ahead) <= self.predownload:
                    source, shard, index = next(addresses)
                    ahead.append((source, shard, index))
                    uses[source, shard] += 1
                    if (source, shard) not in ready:
                        ready[source, shard] = pool.submit(self._prepare, stores[source], shard)
                source, shard, index = ahead.popleft()
                ready[source, shard].result()
                yield self._read(stores[source], source, shard, index)
                uses[source, shard] -= 1
                if not uses[source, shard]:
                    del uses[source, shard], ready[source, shard]
        finally:
            pool.shutdown(cancel_futures=True)

    def _prepare(self, store: ShardStore, shard: int) -> None:
        if store.prepare(shard) and self._cache is not None:
            self._cache.shrink()

    def _read(self, store: ShardStore, source: int, shard: int, index: int) -> Sample:
        tokens = store.read(shard, index)
        if len(tokens) != self.seq_len:
            raise DataError(
                f"sources.{store.name}: has samples of {len(tokens)} tokens, not seq_len {self.seq_len}; "
                f"set seq_len to {len(tokens)} or prepare it again"
            )
        return {"tokens": tokens, "source": source, "sample_id": int(store.first_sample[shard]) + index}

    def _addresses(self, worker: int, workers: int) -> Iterator[tuple[int, int, int]]:
        """Source, shard and index in the shard of every sample of the batches that fall to a worker."""
        ticks = self.global_batch_size // self.schedule.canonical_nodes
        start = self.position // self.schedule.canonical_nodes
        for first, window in _windows(max(1, _WINDOW // ticks)):
            batches = [b for b in range(first, first + window) if b % workers == worker]
            if batches:
                rows = np.array(batches) - first
                span = start + first * ticks, start + (first + window) * ticks
                slices = [self._slice(span, rows, node) for node in self._nodes()]
                yield from map(tuple, np.concatenate(slices, 1).reshape(-1, 3).tolist())

    def _nodes(self) -> range:
        """The canonical nodes that this rank's slice of the batch touches."""
        nodes, rank_batch = self.schedule.canonical_nodes, self.rank_batch_size
        size = self.global_batch_size // nodes
        return range(self.rank * rank_batch // size, ((self.rank + 1) * rank_batch - 1) // size + 1)

    def _slice(self, span: tuple[int, int], rows: Ints, node: int) -> Ints:
        """This rank's addresses in a node's slice of the batches ``rows`` of a span: [rows, samples, 3]."""
        size = self.global_batch_size // self.schedule.canonical_nodes
        first = self.rank * self.rank_batch_size - node * size
        columns = slice(max(first, 0), min(first + self.rank_batch_size, size))
        source, ordinal = (part.reshape(-1, size)[rows, columns] for part in self.schedule.order(*span, node))
        address: Ints = np.stack([source, ordinal, ordinal], -1)
        for number, name in enumerate(self.schedule.sources):
            mine = source == number
            address[mine, 1], address[mine, 2] = self._orders[name].locate(node, ordinal[mine])
        return address

    def state_dict(self, num_samples: int, from_beginning: bool = True) -> dict[str, Any]:
        """All that is needed to go on after ``num_samples`` samples of the whole run, in plain values.

        Composer counts them from the run's beginning; with ``from_beginning=False``, from where this dataset
        was resumed.
        """
        samples = num_samples if from_beginning else self.position + num_samples
        sources = {}
        for name, order in self._orders.items():
            ends = order.generations
            prints = [self._stores[name].fingerprint(a, b) for a, b in itertools.pairwise([0, *ends])]
            sources[name] = order.to_dict() | {"fingerprints": prints}
        return {
            "samples": samples,
            "seq_len": self.seq_len,
            **self._shuffling,
            "schedule": self.schedule.to_dict(),
            "sources": sources,
        }

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Go on at the next sample after ``state``, on any number of ranks and workers.

        The schedule may ask for another future, sources may be new, and shards may have been appended.
        Raises ValueError, showing the difference, if the past or the data in it is not what it was.
        """
        for field, value in ({"seq_len": self.seq_len} | self._shuffling).items():
            if state[field] != value:
                raise ValueError(f"{field}: is {value}, but the run began with {state[field]}")
        old = MixSchedule.from_dict(state["schedule"])
        tick, rest = divmod(state["samples"], old.canonical_nodes)
        assert not rest, "a global batch is a multiple of the canonical nodes"
        schedule = self._asked.resume(old, tick)
        for name, saved in state["sources"].items():
            self._check_data(name, saved)
        served = old.counts(tick, np.arange(old.canonical_nodes))
        for number, name in enumerate(old.sources):
            self._orders[name].load(state["sources"][name], served[:, number])
        self.schedule, self.position = schedule, state["samples"]

    def _check_data(self, name: str, saved: Mapping[str, Any]) -> None:
        store, ends = self._stores[name], saved["generations"]
        if (have := len(store.samples_per_shard)) < ends[-1]:
            found = f"has {have} shards, and the run began with {ends[-1]}"
            raise ValueError(f"sources.{name}: {found}; restore them")
        for (begin, end), known in zip(itertools.pairwise([0, *ends]), saved["fingerprints"], strict=True):
            if (now := store.fingerprint(begin, end)) != known:
                raise ValueError(
                    f"sources.{name}: shards {begin} to {end - 1} have fingerprint {now[:12]}, and the run "
                    f"began with {known[:12]}; restore them, and append new data as further shards"
                )


def _windows(largest: int) -> Iterator[tuple[int, int]]:
    """Starts and lengths of windows in a row; the first are small, so that the first batch comes soon."""
    first, length = 0, 1
    while True:
        yield first, length
        first, length = first + length, min(2 * length, largest)


class EvalDataset(Dataset[Sample]):
    """One source's held-out samples, all of them, in order: ``{"tokens", "source", "sample_id"}``.

    Map-style, so that a DistributedSampler (Composer's ``dist.get_sampler``) shards it over ranks.
    """

    def __init__(
        self,
        local: str,
        *,
        seq_len: int,
        split: str = "val",
        name: str | None = None,
        remote: str | None = None,
    ) -> None:
        """Read the index of ``local``/``split``, fetched from ``remote`` if given; ValueError if missing.

        Shards are fetched when they are first read.
        """
        self.seq_len = seq_len
        self.store = ShardStore(name or local, Source(local, remote, split))
        self._ends: Ints = np.cumsum(self.store.samples_per_shard)

    def __len__(self) -> int:
        return int(self._ends[-1])

    def __getitem__(self, index: int) -> Sample:
        if not 0 <= index < len(self):
            raise IndexError(index)
        shard = int(np.searchsorted(self._ends, index, "right"))
        tokens = self.store.read(shard, index - int(self.store.first_sample[shard]))
        if len(tokens) != self.seq_len:
            found = f"has samples of {len(tokens)} tokens, not seq_len {self.seq_len}"
            raise DataError(f"sources.{self.store.name}: {found}; prepare it again")
        return {"tokens": tokens, "source": 0, "sample_id": index}
