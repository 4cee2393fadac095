"""Writing MDS shards of token samples, byte for byte as ``streaming.MDSWriter`` would.

Streaming's own writer would do, but importing it imports torch, torchvision and every cloud's SDK: some
seven seconds in each worker process. The format is small: ``u32 samples``, ``u32 offsets[samples + 1]``,
the column description as JSON, the samples.
"""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import xxhash
import zstd
from numpy.typing import NDArray

__all__ = [
    "COLUMNS",
    "INDEX",
    "MASKED_COLUMNS",
    "IndexEntry",
    "ShardWriter",
    "fingerprint",
    "read_index",
    "read_shard",
    "write_index",
]

IndexEntry = tuple[int, bytes]
"""Samples and description of a shard; the description stays packed, for there may be many."""

COLUMNS = {"tokens": "ndarray:uint32"}
MASKED_COLUMNS = {"loss": "ndarray:uint8", **COLUMNS}
"""With 1 where a token's prediction is trained; sorted by name, as MDS has them."""
INDEX = "index.json"
SHARD_BYTES = 1 << 25
"""Uncompressed size at which a shard is closed: a worker holds a few times as much."""


class ShardWriter:
    """Collects samples of one length and writes them as zstd-compressed shards into ``folder``.

    Args:
        folder: made when the first shard is written.
        seq_len: tokens of each sample.
        columns: ``COLUMNS``, or ``MASKED_COLUMNS`` if samples come with a loss mask.
    """

    def __init__(self, folder: Path, seq_len: int, columns: dict[str, str] = COLUMNS) -> None:
        self.folder = folder
        self.shards: list[dict[str, Any]] = []
        """One entry for the index per shard written."""
        self._config = _config(columns)
        self._config_bytes = json.dumps(self._config, sort_keys=True).encode()
        self._samples: list[bytes] = []
        shape = _shape_head(seq_len)
        widths = [np.dtype(_dtype(encoding)).itemsize for encoding in columns.values()]
        sizes = [len(shape) + width * seq_len for width in widths]
        self._head, self._shape = np.array(sizes, "<u4").tobytes(), shape
        # 4 bytes of offset go with each sample
        sample_bytes = 4 + len(self._head) + sum(sizes)
        self._samples_per_shard = max(1, (SHARD_BYTES - 8 - len(self._config_bytes)) // sample_bytes)

    def write(self, tokens: NDArray[np.uint32], loss: NDArray[np.uint8] | None = None) -> None:
        """Add one sample, of shape [seq_len], with its loss mask if the columns have one."""
        sample = self._head
        if loss is not None:
            sample += self._shape + loss.astype(np.uint8, copy=False).tobytes()
        self._samples.append(sample + self._shape + tokens.astype("<u4", copy=False).tobytes())
        if len(self._samples) == self._samples_per_shard:
            self._flush()

    def close(self) -> None:
        """Write what is left."""
        if self._samples:
            self._flush()

    def _flush(self) -> None:
        sizes = [len(sample) for sample in self._samples]
        config = self._config_bytes
        offsets = np.cumsum([4 + 4 * (len(sizes) + 1) + len(config), *sizes], dtype="<u4")
        raw = b"".join([np.uint32(len(sizes)).tobytes(), offsets.tobytes(), config, *self._samples])
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
                **self._config,
            }
        )
        self._samples = []


def _config(columns: dict[str, str]) -> dict[str, Any]:
    return {
        "version": 2,
        "format": "mds",
        "compression": "zstd",
        "hashes": ["xxh64"],
        "size_limit": SHARD_BYTES,
        "column_names": list(columns),
        "column_encodings": list(columns.values()),
        "column_sizes": [None] * len(columns),
    }


def _dtype(encoding: str) -> str:
    return encoding.removeprefix("ndarray:")


def _shape_head(seq_len: int) -> bytes:
    """What precedes a column's values in a sample: ``ndim | code of the shape's dtype``, shape."""
    code = next(code for code in range(4) if seq_len < 1 << (8 << code))
    return bytes([1 << 2 | code]) + seq_len.to_bytes(1 << code, "little")


def _describe(name: str, data: bytes) -> dict[str, Any]:
    return {"basename": name, "bytes": len(data), "hashes": {"xxh64": xxhash.xxh64_hexdigest(data)}}


def read_shard(folder: Path, shard: dict[str, Any], column: str = "tokens") -> NDArray[Any]:
    """A column of the samples of a shard that :class:`ShardWriter` wrote, of shape [samples, seq_len].

    Args:
        folder: where the index lies.
        shard: the index's entry.
        column: ``tokens`` (uint32), or ``loss`` (uint8) where the shard has it.
    """
    raw_file = folder / shard["raw_data"]["basename"]
    if raw_file.is_file():
        raw = raw_file.read_bytes()
    else:
        raw = zstd.decompress((folder / shard["zip_data"]["basename"]).read_bytes())
    samples = int(np.frombuffer(raw, "<u4", 1)[0])
    first, second = (int(offset) for offset in np.frombuffer(raw, "<u4", 2, offset=4))
    names = shard["column_names"]
    number, sizes = names.index(column), np.frombuffer(raw, "<u4", len(names), offset=first)
    begin = 4 * len(names) + int(sizes[:number].sum())
    shape_bytes = 1 << (raw[first + begin] & 3)
    rows = np.frombuffer(raw, np.uint8, offset=first).reshape(samples, second - first)
    values = rows[:, begin + 1 + shape_bytes : begin + int(sizes[number])]
    return np.ascontiguousarray(values).view(_dtype(shard["column_encodings"][number]))


def write_index(folder: Path, shards: Iterable[dict[str, Any]]) -> str:
    """Write ``folder/index.json`` in one step: it is there whole or not at all; returns its XXH3."""
    content = json.dumps({"version": 2, "shards": list(shards)}, sort_keys=True).encode()
    partial = folder / f"{INDEX}.tmp"
    partial.write_bytes(content)
    os.replace(partial, folder / INDEX)
    return xxhash.xxh3_128_hexdigest(content)


def read_index(folder: Path) -> list[IndexEntry]:
    """Every shard in ``folder/index.json``; raises OSError, or what its damage leads to."""
    with (folder / INDEX).open() as file:
        return list(json.load(file, object_hook=_pack)["shards"])


def _pack(item: dict[str, Any]) -> Any:
    return (item["samples"], json.dumps(item, sort_keys=True).encode()) if "samples" in item else item


def fingerprint(entries: Sequence[IndexEntry]) -> str:
    """Identity of the data in some shards, wherever they lie: names, sizes and hashes."""
    return hashlib.sha256(b"\n".join(packed for _, packed in entries)).hexdigest()
