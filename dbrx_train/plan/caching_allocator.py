"""CUDA's caching allocator of torch, simulated on a row of allocations and releases.

After ``c10/cuda/CUDACachingAllocator.cpp``: a request is rounded up to 512 bytes and served best fit from the
free blocks of its stream and size class; what is left of a block is split off; a released block merges with
free neighbours. Nothing is given back to the device, so what is reserved only grows.
"""

from __future__ import annotations

import bisect
from dataclasses import dataclass

__all__ = ["CachingAllocator", "rounded"]

_MIB = 2**20
_SMALL = _MIB
"""Requests up to this size are served from pools of their own."""
_SMALL_SEGMENT, _SEGMENT, _ALONE, _GRANULE = 2 * _MIB, 20 * _MIB, 10 * _MIB, 2 * _MIB


def rounded(size: int) -> int:
    """Bytes that a tensor of ``size`` bytes occupies."""
    return -(-size // 512) * 512


@dataclass(eq=False)
class _Block:
    """A piece of a segment, linked to its neighbours there."""

    address: int
    size: int
    pool: _Pool
    free: bool = True
    before: _Block | None = None
    after: _Block | None = None


class _Pool:
    """Free blocks of one stream and size class, by size and address."""

    def __init__(self, small: bool) -> None:
        self.small = small
        self._keys: list[tuple[int, int]] = []
        self._blocks: dict[int, _Block] = {}
        self.last: _Block | None = None
        """Of its one segment, where segments are expandable."""

    def add(self, block: _Block) -> None:
        bisect.insort(self._keys, (block.size, block.address))
        self._blocks[block.address] = block

    def remove(self, block: _Block) -> None:
        self._keys.pop(bisect.bisect_left(self._keys, (block.size, block.address)))
        del self._blocks[block.address]

    def take(self, size: int) -> _Block | None:
        """The smallest free block that holds ``size`` bytes, which is then no longer here."""
        place = bisect.bisect_left(self._keys, (size, -1))
        return self._blocks.pop(self._keys.pop(place)[1]) if place < len(self._keys) else None


class CachingAllocator:
    """``expandable``: one growing segment a pool (``PYTORCH_CUDA_ALLOC_CONF=expandable_segments:True``)."""

    def __init__(self, *, expandable: bool) -> None:
        self.expandable = expandable
        self.reserved = 0
        """Bytes taken from the device so far."""
        self._pools: dict[tuple[int, bool], _Pool] = {}
        self._held: dict[int, _Block] = {}
        self._next_address = 0

    def allocate(self, key: int, size: int, stream: int) -> None:
        """Serve a request of ``size`` bytes on ``stream``; ``key`` names it until it is released."""
        size = rounded(size)
        small = size <= _SMALL
        pool = self._pools.setdefault((stream, small), _Pool(small))
        block = pool.take(size) or (
            self._expanded(pool, size) if self.expandable else self._segment(pool, size)
        )
        rest = block.size - size
        if rest >= 512 if small or self.expandable else rest > _SMALL:
            left = _Block(block.address + size, rest, pool, before=block, after=block.after)
            if left.after is not None:
                left.after.before = left
            block.size, block.after = size, left
            pool.add(left)
            if pool.last is block:
                pool.last = left
        block.free = False
        self._held[key] = block

    def release(self, key: int) -> None:
        """Free what ``key`` names."""
        block = self._held.pop(key)
        block.free = True
        pool = block.pool
        if block.before is not None and block.before.free:
            pool.remove(block.before)
            block = _merged(block.before, block)
        if block.after is not None and block.after.free:
            pool.remove(block.after)
            block = _merged(block, block.after)
        pool.add(block)

    def _segment(self, pool: _Pool, size: int) -> _Block:
        if pool.small:
            segment = _SMALL_SEGMENT
        else:
            segment = _SEGMENT if size < _ALONE else -(-size // _GRANULE) * _GRANULE
        return self._mapped(pool, segment)

    def _expanded(self, pool: _Pool, size: int) -> _Block:
        """The pool's segment, grown by whole pages until its end holds ``size`` bytes."""
        page = _SMALL_SEGMENT if pool.small else _SEGMENT
        last = pool.last
        have = last.size if last is not None and last.free else 0
        grown = self._mapped(pool, -(-(size - have) // page) * page)
        if last is not None:
            grown.before, last.after = last, grown
        pool.last = grown
        if have:
            assert last is not None
            pool.remove(last)
            return _merged(last, grown)
        return grown

    def _mapped(self, pool: _Pool, size: int) -> _Block:
        block = _Block(self._next_address, size, pool)
        self._next_address += size
        self.reserved += size
        return block


def _merged(left: _Block, right: _Block) -> _Block:
    left.size, left.after = left.size + right.size, right.after
    if right.after is not None:
        right.after.before = left
    if left.pool.last is right:
        left.pool.last = left
    return left
