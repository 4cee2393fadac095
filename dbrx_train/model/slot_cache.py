"""The key/value cache of sequences that advance apart: each in a slot of its own, at a length of its own.

Shape suffixes: B rows of a forward pass, S tokens, K key/value heads, C head_dim.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from dbrx_train.model.attention import KVCache, LayerCache
from dbrx_train.model.decoder import Layout

__all__ = ["SlotCache"]


class _Where:
    """Which slots a forward pass is about, where its tokens go, and how far back attention looks."""

    rows: slice | Tensor
    slots_B1: Tensor
    places_BS: Tensor
    end: int


class _SlotLayer(LayerCache):
    """One layer's part."""

    def __init__(self, slots: int, capacity: int, where: _Where) -> None:
        super().__init__(capacity)
        self.slots, self.where = slots, where

    def append(self, k_BKSC: Tensor, v_BKSC: Tensor) -> tuple[Tensor, Tensor]:
        """Put the pass's tokens in their places; the keys and values of its slots, [B, K, end, C] each."""
        if self._kv is None:
            _, heads, _, width = k_BKSC.shape
            # Zeros, since 0 times what lies in fresh memory may be NaN. The last place is for padding.
            self._kv = k_BKSC.new_zeros(2, self.slots, heads, self.capacity + 1, width)
        where = self.where
        for kept, new in zip(self._kv, (k_BKSC, v_BKSC), strict=True):
            kept.transpose(1, 2)[where.slots_B1, where.places_BS] = new.transpose(1, 2)
        keys, values = self._kv[:, where.rows, :, : where.end]
        return keys, values

    def copy(self, source: int, target: int, length: int) -> None:
        if self._kv is not None:
            self._kv[:, target, :, :length] = self._kv[:, source, :, :length]


class SlotCache(KVCache):
    """Keys and values of every layer, for ``slots`` sequences of up to ``capacity`` tokens each."""

    def __init__(self, n_layers: int, slots: int, capacity: int, device: torch.device) -> None:
        self._where, self.device = _Where(), device
        self.layers: list[LayerCache] = [_SlotLayer(slots, capacity, self._where) for _ in range(n_layers)]

    def begin(self, slots: Sequence[int], starts: Sequence[int], counts: Sequence[int]) -> Layout:
        """Where the next forward pass, of a row for each of ``slots``, puts and sees what.

        ``starts``: how many tokens each slot holds. ``counts``: how many of its row's tokens follow these;
        the rest are padding, which is kept nowhere.
        """
        start_B1 = torch.tensor(starts, device=self.device)[:, None]
        count_B1 = torch.tensor(counts, device=self.device)[:, None]
        step_S = torch.arange(max(*counts, 1), device=self.device)
        is_real = step_S < count_B1
        positions = torch.where(is_real, start_B1 + step_S, 0)
        where = self._where
        first, last = slots[0], slots[-1]
        where.slots_B1 = torch.tensor(slots, device=self.device)[:, None]
        # Neighbours are looked at where they lie; others would be copied together.
        where.rows = slice(first, last + 1) if last - first + 1 == len(slots) else where.slots_B1[:, 0]
        where.places_BS = torch.where(is_real, positions, self.capacity)
        where.end = max(start + count for start, count in zip(starts, counts, strict=True) if count)
        keys = torch.arange(where.end, device=self.device)
        return Layout(positions, keys <= positions[:, :, None])

    def copy(self, source: int, target: int, length: int) -> None:
        """The first tokens of a slot into another one."""
        for layer in self.layers:
            assert isinstance(layer, _SlotLayer)
            layer.copy(source, target, length)
