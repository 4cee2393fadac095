"""The scheduled mix as a dataset: every rank and worker finds its samples of any step by arithmetic alone.

**Layout.** The global batch of a step is C = ``canonical_nodes`` slices of equal size. Canonical node c runs
the schedule on its own part of every source and fills slice c, so the samples of a step depend on the step
alone, never on the number of ranks. Rank r of R takes the r-th of R equal slices of each global batch, and
worker w of W every W-th batch of its rank (which is how a DataLoader collects them). How many samples a step
has, and how long they are, is the clock's to say.

**State.** A position, counted in samples of the whole run, says all about progress. The state adds what has
to be the same for it to mean the same: the schedule and the steps' sizes so far, the seed, the data's
fingerprints.

The dataset has no end and so no length: past its last point the schedule holds its weights. A run is one
epoch for the trainer, however often it goes through its sources.
"""

from __future__ import annotations

import itertools
import sys
from collections import Counter, deque
from collections.abc import Iterator, Mapping
from concurrent.futures import Future, ThreadPoolExecutor
from typing import Any

import numpy as np
from numpy.typing import NDArray
from streaming.base.distributed import get_rank, get_world_size
from torch.utils.data import Dataset, IterableDataset, get_worker_info

from dbrx_train.data.mix.apportionment import Ints
from dbrx_train.data.mix.schedule import MixSchedule
from dbrx_train.data.stream.shards import DataError, ShardCache, ShardStore, Source
from dbrx_train.data.stream.shuffle import SourceOrder
from dbrx_train.schedule import Clock

__all__ = ["EvalDataset", "Sample", "ScheduledDataset"]

Sample = dict[str, Any]
Address = tuple[int, int, int]
"""Source, shard, index in the shard."""

_WINDOW = 8192
"""Samples of a canonical node that are planned at a time."""


class ScheduledDataset(IterableDataset[list[Sample]]):
    """This rank's samples of every step, in the schedule's order; ``build_loader`` makes batches of them.

    A sample is ``{"tokens": int64 [sequence], "source": int, "sample_id": int}``: ``source`` counts in
    ``schedule.sources``, ``sample_id`` is the sample's number within its source. Samples of conversations
    have a ``loss`` mask too, bool [sequence].
    """

    def __init__(
        self,
        sources: Mapping[str, Source],
        schedule: MixSchedule,
        clock: Clock,
        *,
        shuffle: bool = True,
        shuffle_seed: int = 0,
        shuffle_block_size: int = 1 << 18,
        predownload: int | None = None,
        cache_limit: int | None = None,
        rank: int | None = None,
        world_size: int | None = None,
    ) -> None:
        """Read the sources' indexes; no sample is read yet.

        ``predownload`` is how many samples ahead of those in use a worker has shards made ready (default:
        those of eight batches); ``cache_limit`` bounds in bytes what the sources keep locally that can be had
        again (None: no bound). Raises ValueError for a source that is unknown, missing or too small,
        or sizes that are negative or do not divide. Iterating raises DataError, a ValueError of one line, for
        bad data.
        """
        self.rank = get_rank() if rank is None else rank
        self.world_size = get_world_size() if world_size is None else world_size
        sizes = [stage.global_batch_size for stage in clock.stages]
        for parts, what in ((self.world_size, "ranks"), (schedule.canonical_nodes, "canonical nodes")):
            for size in sizes:
                if size < 1 or size % parts:
                    raise ValueError(f"global_batch_size: {size} is no multiple of the {parts} {what}")
        for field, value in (("predownload", predownload), ("cache_limit", cache_limit)):
            if value is not None and value < 0:
                raise ValueError(f"{field}: {value} is negative; use 0 or more, or leave it out")
        if missing := set(schedule.sources) - set(sources):
            raise ValueError(f"mix: {min(missing)} is no source; use {', '.join(sources)}")
        self.schedule = self._asked = schedule
        self.clock = clock
        self.sample_lengths = schedule.sample_lengths(clock)
        self.predownload = predownload
        self.reference: Mapping[str, NDArray[np.float32]] = {}
        """By source, what a run knows of each sample beforehand, [samples, …]: a sample's ``reference``."""
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
    def batches_left(self) -> int:
        """Steps from ``position`` to the end of the clock."""
        return max(0, self.clock.total_batches - int(self.clock.convert(self.position, "sp", "ba")))

    @property
    def sizes(self) -> dict[str, int]:
        """Samples in each source."""
        return {name: int(store.samples_per_shard.sum()) for name, store in self._stores.items()}

    def __iter__(self) -> Iterator[list[Sample]]:
        """This worker's batches from ``position`` on, while a thread prepares the shards of those ahead."""
        if self._cache is not None:
            self._cache.shrink()  # an earlier run may have kept more
        worker = get_worker_info()
        batches = self._addresses(*((worker.id, worker.num_workers) if worker else (0, 1)))
        stores = [self._stores[name] for name in self.schedule.sources]
        ahead: deque[list[Address]] = deque()
        ready: dict[tuple[int, int], Future[None]] = {}
        uses: Counter[tuple[int, int]] = Counter()
        pool = ThreadPoolExecutor(1, "prefetch")
        try:
            while True:
                while len(ahead) <= 8 if self.predownload is None else uses.total() <= self.predownload:
                    ahead.append(next(batches))
                    for source, shard, _ in ahead[-1]:
                        uses[source, shard] += 1
                        if (source, shard) not in ready:
                            ready[source, shard] = pool.submit(self._prepare, stores[source], shard)
                batch = []
                for source, shard, index in ahead.popleft():
                    ready[source, shard].result()
                    batch.append(self._read(stores[source], source, shard, index))
                    uses[source, shard] -= 1
                    if not uses[source, shard]:
                        del uses[source, shard], ready[source, shard]
                yield batch
        finally:
            pool.shutdown(cancel_futures=True)

    def _prepare(self, store: ShardStore, shard: int) -> None:
        if store.prepare(shard) and self._cache is not None:
            self._cache.shrink()

    def _read(self, store: ShardStore, source: int, shard: int, index: int) -> Sample:
        sample, seq_len = store.read(shard, index), self.sample_lengths[store.name]
        if (length := len(sample["tokens"])) != seq_len:
            raise DataError(
                f"sources.{store.name}: has samples of {length} tokens, not seq_len {seq_len}; "
                f"set seq_len to {length} or prepare it again"
            )
        number = int(store.first_sample[shard]) + index
        if store.name in self.reference:
            sample["reference"] = self.reference[store.name][number]
        return {**sample, "source": source, "sample_id": number}

    def _addresses(self, worker: int, workers: int) -> Iterator[list[Address]]:
        """The addresses of this rank's samples in every batch that falls to a worker."""
        passed = 0
        for start, size, batches in self._windows():
            rows = np.arange(batches)
            rows = rows[(rows + passed) % workers == worker]
            passed += batches
            if len(rows):
                slices = [self._slice(start, size, batches, rows, node) for node in self._nodes(size)]
                # A batch at a time: tuples by the thousand would bring on full garbage collections, which
                # write to the pages that a worker shares with the main process.
                yield from ([*map(tuple, batch.tolist())] for batch in np.concatenate(slices, 1))

    def _windows(self) -> Iterator[tuple[int, int, int]]:
        """Equal steps in a row, from ``position`` on: their first sample, their size, and how many they are.

        The first are few, so that the first batch comes soon.
        """
        start, most = self.position, 1
        while True:
            size = self.clock.stage(start, "sp").global_batch_size
            ends = (stage.sample for stage in self.clock.stages if stage.sample > start)
            batches = min(most, (next(ends, sys.maxsize) - start) // size)
            yield start, size, batches
            start += batches * size
            most = max(1, min(2 * most, _WINDOW * self.schedule.canonical_nodes // size))

    def _nodes(self, size: int) -> range:
        """The canonical nodes that this rank's slice of a batch of ``size`` samples touches."""
        mine, part = size // self.world_size, size // self.schedule.canonical_nodes
        return range(self.rank * mine // part, ((self.rank + 1) * mine - 1) // part + 1)

    def _slice(self, start: int, size: int, batches: int, rows: Ints, node: int) -> Ints:
        """This rank's addresses in a node's slice of the batches ``rows`` of a window: [rows, samples, 3]."""
        nodes, mine = self.schedule.canonical_nodes, size // self.world_size
        part = size // nodes
        first = self.rank * mine - node * part
        columns = slice(max(first, 0), min(first + mine, part))
        ticks = start // nodes, start // nodes + batches * part
        source, ordinal = (
            each.reshape(-1, part)[rows, columns] for each in self.schedule.order(*ticks, node)
        )
        address: Ints = np.stack([source, ordinal, ordinal], -1)
        for number, name in enumerate(self.schedule.sources):
            found = source == number
            address[found, 1], address[found, 2] = self._orders[name].locate(node, ordinal[found])
        return address

    def state_dict(self, num_samples: int, from_beginning: bool = True) -> dict[str, Any]:
        """All that is needed to go on after ``num_samples`` samples of the whole run, in plain values.

        Composer counts them from the run's beginning; with ``from_beginning=False``, from where this dataset
        was resumed.
        """
        samples = num_samples if from_beginning else self.position + num_samples
        tokens = self._tokens_after(samples)
        sources = {}
        for name, order in self._orders.items():
            ends = order.appends
            prints = [self._stores[name].fingerprint(a, b) for a, b in itertools.pairwise([0, *ends])]
            sources[name] = order.to_dict() | {"fingerprints": prints}
        return {
            "samples": samples,
            "tokens": tokens,
            "steps": self._steps_before(tokens),
            **self._shuffling,
            "schedule": self.schedule.to_dict(),
            "sources": sources,
        }

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Go on at the next sample after ``state``, on any number of ranks and workers.

        The schedule may ask for another future, sources may be new, and shards may have been appended.
        Raises ValueError, showing the difference, if the past or the data in it is not what it was.
        """
        for field, value in self._shuffling.items():
            if state[field] != value:
                raise ValueError(f"{field}: is {value}, but the run began with {state[field]}")
        self._check_steps(state["steps"], state["tokens"])
        old = MixSchedule.from_dict(state["schedule"])
        tick = state["samples"] // old.canonical_nodes
        schedule = self._asked.resume(old, tick)
        for name, saved in state["sources"].items():
            self._check_data(name, saved)
        served = old.counts(tick, np.arange(old.canonical_nodes))
        for number, name in enumerate(old.sources):
            self._orders[name].load(state["sources"][name], served[:, number])
        self.schedule, self.position = schedule, state["samples"]

    def _steps_before(self, tokens: int) -> list[list[int]]:
        """The stages that have begun: first token, tokens of a step, tokens of a sample."""
        begun = (stage for stage in self.clock.stages if stage.token < tokens or not stage.token)
        return [[stage.token, stage.tokens_per_batch, stage.seq_len] for stage in begun]

    def _check_steps(self, past: list[list[int]], tokens: int) -> None:
        now = self._steps_before(tokens)
        for begin in sorted({begin for begin, _, _ in past + now}):
            was, wanted = (max(stage for stage in stages if stage[0] <= begin) for stages in (past, now))
            if was[2] != wanted[2]:
                raise ValueError(
                    f"mix: the past cannot change: after {begin:,} tokens samples had {was[2]}, and now have "
                    f"{wanted[2]}; keep the point that sets seq_len where it was, in tok (one in dur moves "
                    f"with max_duration)"
                )
            if was[1] != wanted[1]:
                raise ValueError(
                    f"global_batch_size: the past cannot change: after {begin:,} tokens a step had "
                    f"{was[1]:,}, and now has {wanted[1]:,}; what was is kept with batch_size_warmup: "
                    f"{_warmup(past, tokens)}"
                )

    def _tokens_after(self, samples: int) -> int:
        if self.clock.convert(samples, "sp", "ba").denominator != 1:
            raise ValueError(
                f"num_samples: {samples} end amid a step; count those of all ranks, step by step"
            )
        return int(self.clock.convert(samples, "sp", "tok"))

    def _check_data(self, name: str, saved: Mapping[str, Any]) -> None:
        store, ends = self._stores[name], saved["appends"]
        if (have := len(store.samples_per_shard)) < ends[-1]:
            found = f"has {have} shards, and the run began with {ends[-1]}"
            raise ValueError(f"sources.{name}: {found}; restore them")
        for (begin, end), known in zip(itertools.pairwise([0, *ends]), saved["fingerprints"], strict=True):
            if (now := store.fingerprint(begin, end)) != known:
                raise ValueError(
                    f"sources.{name}: shards {begin} to {end - 1} have fingerprint {now[:12]}, and the run "
                    f"began with {known[:12]}; restore them, and append new data as further shards"
                )


def _warmup(past: list[list[int]], tokens: int) -> str:
    """The batch-size warm-up, as YAML, whose steps up to ``tokens`` are those of the past."""
    ends = [*(begin for begin, _, _ in past[1:]), tokens]
    following = [*(step for _, step, _ in past[1:]), 0]
    entries = [
        f"{{until: {end}tok, global_batch_size: {step // past[0][2]}}}"
        for (_, step, _), end, after in zip(past, ends, following, strict=True)
        if step != after
    ]
    return f"[{', '.join(entries)}]"


class EvalDataset(Dataset[Sample]):
    """One source's held-out samples, all of them, in order, with the keys of ``ScheduledDataset``'s.

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
        self.reference: NDArray[np.float32] | None = None
        """As ``ScheduledDataset``'s, of this source."""
        self.store = ShardStore(name or local, Source(local, remote, split))
        self._ends: Ints = np.cumsum(self.store.samples_per_shard)

    def __len__(self) -> int:
        return int(self._ends[-1])

    def __getitem__(self, index: int) -> Sample:
        if not 0 <= index < len(self):
            raise IndexError(index)
        shard = int(np.searchsorted(self._ends, index, "right"))
        sample = self.store.read(shard, index - int(self.store.first_sample[shard]))
        if (length := len(sample["tokens"])) != self.seq_len:
            found = f"has samples of {length} tokens, not seq_len {self.seq_len}"
            raise DataError(f"sources.{self.store.name}: {found}; prepare it again")
        if self.reference is not None:
            sample["reference"] = self.reference[index]
        return {**sample, "source": 0, "sample_id": index}
