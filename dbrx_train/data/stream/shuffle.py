"""The order in which one source's samples are read, lap after lap, by random access.

Every canonical node reads a part of its own: an equal run of each generation's samples (a *generation* is the
shards that arrived together: the first ones, then whatever was appended). A *lap* reads each sample of the
lap's generations once. Within a lap the shards are permuted, strung together, cut into blocks and permuted
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
class _Laps:
    """Laps from number ``first`` on read generations [begin, end)."""

    first: int
    begin: int
    end: int


class SourceOrder:
    """Where a canonical node finds the k-th sample that it takes from a source, for any k.

    Appended shards form a new generation. The lap in progress goes on with what it began; the next lap reads
    only what no lap has read yet; later laps read everything. So new samples come after all old ones, and no
    sample is repeated before the source is exhausted.
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
        self._restart([len(samples_per_shard)], [_Laps(0, 0, 1)])
        if self.edges[-1] < canonical_nodes:
            found = f"has {self.edges[-1]} samples, too few for {canonical_nodes} canonical nodes"
            raise ValueError(f"sources.{name}: {found}; add data or lower canonical_nodes")

    def _restart(self, generations: Sequence[int], laps: Sequence[_Laps]) -> None:
        self.generations, self.laps = list(generations), list(laps)
        self._decks: dict[int, tuple[int, _Deck]] = {}

    def locate(self, node: int, ordinal: Ints) -> tuple[Ints, Ints]:
        """Shard, and index in the shard, of the node's samples number ``ordinal``: three arrays alike."""
        lap, index = self._lap(node, ordinal)
        shard, offset = np.empty_like(ordinal), np.empty_like(ordinal)
        for number in np.unique(lap).tolist():
            mine = lap == number
            shard[mine], offset[mine] = self._deck(node, number).locate(index[mine])
        return shard, offset

    def append(self, served: Ints) -> None:
        """Take in the shards after the last generation, the nodes having read ``served`` [nodes] samples."""
        unbegun = 0
        for node, count in enumerate(served):
            lap, index = self._lap(node, np.array([count]))
            unbegun = max(unbegun, int(lap[0]) + int(index[0] > 0))
        begun = [laps for laps in self.laps if laps.first < unbegun]
        unread = max((laps.end for laps in begun), default=0)
        everything = len(self.generations) + 1
        # While nothing has been read, the new shards are as good as the old ones.
        fresh = [_Laps(unbegun, unread, everything)] if unread else []
        following = [*fresh, _Laps(unbegun + len(fresh), 0, everything)]
        self._restart([*self.generations, len(self.edges) - 1], begun + following)

    def to_dict(self) -> dict[str, Any]:
        """Plain lists from which ``load`` goes on: each generation's last shard + 1, and the laps."""
        return {
            "generations": self.generations,
            "laps": [[laps.first, laps.begin, laps.end] for laps in self.laps],
        }

    def load(self, state: Mapping[str, Any], served: Ints) -> None:
        """Go on from ``to_dict``, with shards that were appended since (known by the shards' number)."""
        self._restart(state["generations"], [_Laps(*laps) for laps in state["laps"]])
        if len(self.edges) - 1 > self.generations[-1]:
            self.append(served)

    def _lap(self, node: int, ordinal: Ints) -> tuple[Ints, Ints]:
        """Lap, and index within the lap, of the node's samples number ``ordinal``."""
        firsts = np.array([laps.first for laps in self.laps])
        lengths = np.array([sum(b - a for a, b in self._parts(node, laps)) for laps in self.laps])
        starts = np.array([0, *np.cumsum(np.diff(firsts) * lengths[:-1])])
        version = np.searchsorted(starts, ordinal, "right") - 1
        lap, index = np.divmod(ordinal - starts[version], lengths[version])
        return firsts[version] + lap, index

    def _parts(self, node: int, laps: _Laps) -> list[tuple[int, int]]:
        """The node's part of each generation of some laps, as ranges of the source's samples."""
        bounds = self.edges[[0, *self.generations]].tolist()[laps.begin : laps.end + 1]
        nodes = self.canonical_nodes
        return [
            (a + (b - a) * node // nodes, a + (b - a) * (node + 1) // nodes)
            for a, b in itertools.pairwise(bounds)
        ]

    def _deck(self, node: int, lap: int) -> _Deck:
        if node not in self._decks or self._decks[node][0] != lap:
            laps = [laps for laps in self.laps if laps.first <= lap][-1]
            key = [self.seed, zlib.crc32(self.name.encode()), node, lap] if self.shuffle else None
            self._decks[node] = lap, _Deck(self.edges, self._parts(node, laps), key, self.block_size)
        return self._decks[node][1]


class _Deck:
    """The order of one lap's samples on one node: slices of shards, strung together, shuffled by blocks."""

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
        """Shard and index in the shard of the lap's samples number ``index``."""
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
