"""The order in which one source's samples are read, epoch after epoch, by random access.

Every canonical node reads a part of its own: an equal run of each append's samples (an *append* is the
shards that arrived together: the first ones, then whatever was appended). An *epoch* reads each sample of its
appends once. Within an epoch the shards are permuted, strung together, cut into blocks and permuted
within each block, so that planning takes memory for one block and few shards are needed at a time.
"""

from __future__ import annotations

import itertools
import zlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from dbrx_train.data.mix.apportionment import Ints

__all__ = ["SourceOrder"]


@dataclass(frozen=True)
class _Epochs:
    """Epochs from number ``first`` on read appends [begin, end)."""

    first: int
    begin: int
    end: int


class SourceOrder:
    """Where a canonical node finds the k-th sample that it takes from a source, for any k.

    The epoch in progress goes on with what it began when shards are appended; the next epoch reads only what
    no epoch has read yet; later epochs read everything. So new samples come after all old ones, and no sample
    is repeated before the source is exhausted.
    """

    def __init__(
        self,
        name: str,
        samples_per_shard: Ints,
        *,
        canonical_nodes: int = 1,
        shuffle: bool = True,
        shuffle_seed: int = 0,
        shuffle_block_size: int = 1 << 18,
    ) -> None:
        """Raises ValueError if the source has fewer samples than there are canonical nodes."""
        self.name, self.canonical_nodes = name, canonical_nodes
        self.shuffle, self.seed, self.block_size = shuffle, shuffle_seed, shuffle_block_size
        self.edges: Ints = np.array([0, *np.cumsum(samples_per_shard)])
        self._restart([len(samples_per_shard)], [_Epochs(0, 0, 1)])
        if self.edges[-1] < canonical_nodes:
            found = f"has {self.edges[-1]} samples, too few for {canonical_nodes} canonical nodes"
            raise ValueError(f"sources.{name}: {found}; add data or lower canonical_nodes")

    def _restart(self, appends: Sequence[int], epochs: Sequence[_Epochs]) -> None:
        self.appends, self.epochs = list(appends), list(epochs)
        self._orders: dict[int, tuple[int, _EpochOrder]] = {}

    def locate(self, node: int, ordinal: Ints) -> tuple[Ints, Ints]:
        """Shard, and index in the shard, of the node's samples number ``ordinal``: three arrays alike."""
        epoch, index = self._epoch(node, ordinal)
        shard, offset = np.empty_like(ordinal), np.empty_like(ordinal)
        for number in np.unique(epoch).tolist():
            mine = epoch == number
            shard[mine], offset[mine] = self._order_of(node, number).locate(index[mine])
        return shard, offset

    def append(self, served: Ints) -> None:
        """Take in the shards after the last append, the nodes having read ``served`` [nodes] samples."""
        unbegun = 0
        for node, count in enumerate(served):
            epoch, index = self._epoch(node, np.array([count]))
            unbegun = max(unbegun, int(epoch[0]) + int(index[0] > 0))
        begun = [epochs for epochs in self.epochs if epochs.first < unbegun]
        unread = max((epochs.end for epochs in begun), default=0)
        everything = len(self.appends) + 1
        # While nothing has been read, the new shards are as good as the old ones.
        fresh = [_Epochs(unbegun, unread, everything)] if unread else []
        following = [*fresh, _Epochs(unbegun + len(fresh), 0, everything)]
        self._restart([*self.appends, len(self.edges) - 1], begun + following)

    def to_dict(self) -> dict[str, Any]:
        """Plain lists from which ``load`` goes on: each append's last shard + 1, and the epochs."""
        return {
            "appends": self.appends,
            "epochs": [[epochs.first, epochs.begin, epochs.end] for epochs in self.epochs],
        }

    def load(self, state: Mapping[str, Any], served: Ints) -> None:
        """Go on from ``to_dict``, with shards that were appended since (known by the shards' number)."""
        self._restart(state["appends"], [_Epochs(*epochs) for epochs in state["epochs"]])
        if len(self.edges) - 1 > self.appends[-1]:
            self.append(served)

    def _epoch(self, node: int, ordinal: Ints) -> tuple[Ints, Ints]:
        """Epoch, and index within the epoch, of the node's samples number ``ordinal``."""
        firsts = np.array([epochs.first for epochs in self.epochs])
        lengths = np.array([sum(b - a for a, b in self._parts(node, epochs)) for epochs in self.epochs])
        starts = np.array([0, *np.cumsum(np.diff(firsts) * lengths[:-1])])
        version = np.searchsorted(starts, ordinal, "right") - 1
        epoch, index = np.divmod(ordinal - starts[version], lengths[version])
        return firsts[version] + epoch, index

    def _parts(self, node: int, epochs: _Epochs) -> list[tuple[int, int]]:
        """The node's part of each append of some epochs, as ranges of the source's samples."""
        bounds = self.edges[[0, *self.appends]].tolist()[epochs.begin : epochs.end + 1]
        nodes = self.canonical_nodes
        return [
            (a + (b - a) * node // nodes, a + (b - a) * (node + 1) // nodes)
            for a, b in itertools.pairwise(bounds)
        ]

    def _order_of(self, node: int, epoch: int) -> _EpochOrder:
        if node not in self._orders or self._orders[node][0] != epoch:
            epochs = [epochs for epochs in self.epochs if epochs.first <= epoch][-1]
            key = [self.seed, zlib.crc32(self.name.encode()), node, epoch] if self.shuffle else None
            self._orders[node] = (
                epoch,
                _EpochOrder(self.edges, self._parts(node, epochs), key, self.block_size),
            )
        return self._orders[node][1]


class _EpochOrder:
    """The order of one epoch's samples on one node: slices of shards, strung together, shuffled by blocks."""

    def __init__(
        self, edges: Ints, parts: Sequence[tuple[int, int]], key: list[int] | None, block_size: int
    ) -> None:
        slices = []
        for begin, end in parts:
            shards = np.arange(
                np.searchsorted(edges, begin, "right") - 1, np.searchsorted(edges, end, "left")
            )
            starts = np.maximum(edges[shards], begin)
            slices.append((shards, starts - edges[shards], np.minimum(edges[shards + 1], end) - starts))
        table = np.concatenate(slices, 1)
        if key is not None:
            table = table[:, _permutation(key, table.shape[1])]
        self.shards, self.starts, sizes = table
        self.ends = np.cumsum(sizes)
        self.begins = self.ends - sizes
        self.key, self.block_size = key, block_size
        self._block: tuple[int, Ints] = (-1, np.empty(0, np.int64))

    def locate(self, index: Ints) -> tuple[Ints, Ints]:
        """Shard and index in the shard of the epoch's samples number ``index``."""
        place = index if self.key is None else self._shuffled(index, self.key)
        slot = np.searchsorted(self.ends, place, "right")
        return self.shards[slot], self.starts[slot] + place - self.begins[slot]

    def _shuffled(self, index: Ints, key: list[int]) -> Ints:
        block, place = np.divmod(index, self.block_size)
        for number in np.unique(block).tolist():
            begin = number * self.block_size
            if self._block[0] != number:
                size = min(self.block_size, int(self.ends[-1]) - begin)
                self._block = number, _permutation([*key, number], size)
            mine = block == number
            place[mine] = begin + self._block[1][place[mine]]
        return place


def _permutation(key: Sequence[int], size: int) -> Ints:
    # RandomState's streams are frozen (NEP 19): a run resumes alike under another numpy.
    return np.random.RandomState(list(key)).permutation(size)
