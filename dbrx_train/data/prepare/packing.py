"""Documents into samples of equal length: one after the other, or each whole within a sample."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

from dbrx_train.data.mds import ShardWriter
from dbrx_train.data.origins import Origin, OriginLog

__all__ = ["Packer", "WholePacker"]

_OPEN = 32
"""Samples of which each may still take a document that fits."""


class Packer:
    """Packs documents of any length, one after the other, into samples of ``seq_len`` tokens."""

    def __init__(self, writer: ShardWriter, seq_len: int) -> None:
        self._writer = writer
        self._seq_len = seq_len
        self._held: list[NDArray[np.uint32]] = []
        self._size = 0
        self._origins = OriginLog()
        self.tokens = 0
        """Tokens added so far."""

    @property
    def shards(self) -> list[dict[str, Any]]:
        """Entries for the index."""
        return self._writer.shards

    def begin(self, origin: Origin) -> None:
        """What is added from now on is a document from there."""
        self._origins.add(self.tokens, origin)

    def add(self, ids: NDArray[np.uint32]) -> None:
        """Add ids of shape [tokens] and write each sample that they complete."""
        self._held.append(ids)
        self._size += len(ids)
        self.tokens += len(ids)
        if self._size >= self._seq_len:
            joined = np.concatenate(self._held)
            whole = self._size - self._size % self._seq_len
            for sample in joined[:whole].reshape(-1, self._seq_len):
                self._writer.write(sample)
            self._held = [joined[whole:].copy()]
            self._size -= whole

    def take(self, rest: dict[str, Any]) -> None:
        """Add what another packer's ``close`` gave."""
        for begin, origin in rest["documents"]:
            self._origins.add(self.tokens + begin, Origin(*origin))
        self.add(np.array(rest["tokens"], dtype=np.uint32))

    def close(self) -> dict[str, Any]:
        """Close the last shard; returns the tokens left over, fewer than ``seq_len``, and their documents."""
        self._writer.close()
        whole = self.tokens - self._size
        if whole:
            self._origins.write(self._writer.folder, whole)
        tokens = [int(token) for ids in self._held for token in ids]
        return {"tokens": tokens, "documents": self._origins.since(whole) if tokens else []}

    def finish(self) -> int:
        """Close the last shard; returns how many tokens are dropped, as they fill no sample."""
        return len(self.close()["tokens"])


Document = tuple[NDArray[np.uint32], NDArray[np.uint8], Origin]
"""Ids and loss mask, [tokens] each, and where it was read."""


class WholePacker:
    """Packs documents of at most ``seq_len`` tokens into samples, none cut; what is left is padding.

    Each goes where it leaves the least room among a few open samples (best fit), in the order of arrival.
    """

    def __init__(self, writer: ShardWriter, seq_len: int, pad_id: int) -> None:
        self._writer = writer
        self._seq_len = seq_len
        self._pad_id = pad_id
        self._open: list[list[Document]] = []
        self._origins = OriginLog()
        self._written = 0
        self.tokens = 0
        """Tokens added so far, padding not counted."""

    @property
    def shards(self) -> list[dict[str, Any]]:
        """Entries for the index."""
        return self._writer.shards

    def add(self, ids: NDArray[np.uint32], loss: NDArray[np.uint8], origin: Origin) -> None:
        """Add a document, with 1 where a token's prediction is trained; both of shape [tokens]."""
        assert 0 < len(ids) == len(loss) <= self._seq_len
        self.tokens += len(ids)
        fitting = [sample for sample in self._open if len(ids) <= self._room(sample)]
        if fitting:
            sample = min(fitting, key=self._room)
        else:
            if len(self._open) == _OPEN:
                self._write(min(self._open, key=self._room))
            self._open.append(sample := [])
        sample.append((ids, loss, origin))
        if not self._room(sample):
            self._write(sample)

    def take(self, rest: Sequence[tuple[list[int], list[int], Sequence[Any]]]) -> None:
        """Add what another packer's ``close`` gave."""
        for ids, loss, origin in rest:
            self.add(np.array(ids, dtype=np.uint32), np.array(loss, dtype=np.uint8), Origin(*origin))

    def close(self) -> list[tuple[list[int], list[int], Origin]]:
        """Close the last shard; returns the documents of the samples that are still open."""
        self._writer.close()
        if self._written:
            self._origins.write(self._writer.folder, self._written * self._seq_len)
        return [
            (ids.tolist(), loss.tolist(), origin) for sample in self._open for ids, loss, origin in sample
        ]

    def finish(self) -> int:
        """Pad and write the open samples and close the last shard; returns 0, as no token is dropped."""
        for sample in list(self._open):
            self._write(sample)
        self.close()
        return 0

    def _room(self, sample: list[Document]) -> int:
        return self._seq_len - sum(len(ids) for ids, _, _ in sample)

    def _write(self, sample: list[Document]) -> None:
        room = self._room(sample)
        begin = self._written * self._seq_len
        for document, _, origin in sample:
            self._origins.add(begin, origin)
            begin += len(document)
        self._written += 1
        ids = np.concatenate([*(ids for ids, _, _ in sample), np.full(room, self._pad_id, np.uint32)])
        self._writer.write(ids, np.concatenate([*(loss for _, loss, _ in sample), np.zeros(room, np.uint8)]))
        self._open = [other for other in self._open if other is not sample]
