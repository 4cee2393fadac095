"""Writing MDS shards of token samples, byte for byte as ``streaming.MDSWriter`` would.

Streaming's own writer would do, but importing it imports torch, torchvision and every cloud's SDK: some
seven seconds in each worker process. The format is small: ``u32 samples``, ``u32 offsets[samples + 1]``,
the column description as JSON, the samples.
"""

from __future__ import annotations

import json
import os
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import numpy as np
import xxhash
import zstd
from numpy.typing import NDArray

__all__ = ["COLUMNS", "INDEX", "ShardWriter", "read_shard", "write_index"]

COLUMNS = {"tokens": "ndarray:uint32"}
INDEX = "index.json"
SHARD_BYTES = 1 << 25
"""Uncompressed size at which a shard is closed: a worker holds a few times as much."""

_CONFIG: dict[str, Any] = {
    "version": 2,
    "format": "mds",
    "compression": "zstd",
    "hashes": ["xxh64"],
    "size_limit": SHARD_BYTES,
    "column_names": list(COLUMNS),
    "column_encodings": list(COLUMNS.values()),
    "column_sizes": [None],
}
_CONFIG_BYTES = json.dumps(_CONFIG, sort_keys=True).encode()


class ShardWriter:
    """Collects samples of one length and writes them as zstd-compressed shards into ``folder``.

    Args:
        folder: made when the first shard is written.
        seq_len: tokens of each sample.
    """

    def __init__(self, folder: Path, seq_len: int) -> None:
        self.folder = folder
        self.shards: list[dict[str, Any]] = []
        """One entry for the index per shard written."""
        self._head = _sample_head(seq_len)
        self._samples: list[bytes] = []
        # 4 bytes of offset go with each sample
        sample_bytes = 4 + len(self._head) + 4 * seq_len
        self._samples_per_shard = max(1, (SHARD_BYTES - 8 - len(_CONFIG_BYTES)) // sample_bytes)

    def write(self, tokens: NDArray[np.uint32]) -> None:
        """Add one sample, of shape [seq_len]."""
        self._samples.append(self._head + tokens.astype("<u4", copy=False).tobytes())
        if len(self._samples) == self._samples_per_shard:
            self._flush()

    def close(self) -> None:
        """Write what is left."""
        if self._samples:
            self._flush()

    def _flush(self) -> None:
        sizes = [len(sample) for sample in self._samples]
        offsets = np.cumsum([4 + 4 * (len(sizes) + 1) + len(_CONFIG_BYTES), *sizes], dtype="<u4")
        raw = b"".join([np.uint32(len(sizes)).tobytes(), offsets.tobytes(), _CONFIG_BYTES, *self._samples])
        # One thread whatever the machine, as the compressed bytes depend on it
        zipped = zstd.compress(raw, 3, 1)
        name = f"shard.{len(self.shards):05}.mds"
        self.folder.mkdir(parents=True, exist_ok=True)
        (self.folder / f"{name}.zstd").write_bytes(zipped)
        self.shards.append(
            {
                "samples": len(sizes),
                "raw_data": _describe(name, raw),
                "zip_data": _describe(f"{name}.zstd", zipped),
                **_CONFIG,
            }
        )
        self._samples = []


def _sample_head(seq_len: int) -> bytes:
    """What precedes a sample's values: its size in bytes, ``ndim | code of the shape's dtype``, shape."""
    code = next(code for code in range(4) if seq_len < 1 << (8 << code))
    shape = bytes([1 << 2 | code]) + seq_len.to_bytes(1 << code, "little")
    return np.uint32(len(shape) + 4 * seq_len).tobytes() + shape


def _describe(name: str, data: bytes) -> dict[str, Any]:
    return {"basename": name, "bytes": len(data), "hashes": {"xxh64": xxhash.xxh64_hexdigest(data)}}


def read_shard(folder: Path, shard: dict[str, Any]) -> NDArray[np.uint32]:
    """The samples of a shard that :class:`ShardWriter` wrote, of shape [samples, seq_len].

    Args:
        folder: where the index lies.
        shard: the index's entry.
    """
    raw_file = folder / shard["raw_data"]["basename"]
    if raw_file.is_file():
        raw = raw_file.read_bytes()
    else:
        raw = zstd.decompress((folder / shard["zip_data"]["basename"]).read_bytes())
    samples = int(np.frombuffer(raw, "<u4", 1)[0])
    first, second = (int(offset) for offset in np.frombuffer(raw, "<u4", 2, offset=4))
    shape_bytes = 1 << (raw[first + 4] & 3)
    rows = np.frombuffer(raw, np.uint8, offset=first).reshape(samples, second - first)
    return np.ascontiguousarray(rows[:, 5 + shape_bytes :]).view("<u4")


def write_index(folder: Path, shards: Iterable[dict[str, Any]]) -> None:
    """Write ``folder/index.json`` in one step: it is there whole or not at all."""
    partial = folder / f"{INDEX}.tmp"
    partial.write_text(json.dumps({"version": 2, "shards": list(shards)}, sort_keys=True))
    os.replace(partial, folder / INDEX)
