"""One source's shards: fetched, unpacked, cached and read through mosaicml-streaming's Stream.

What is present is what the file system shows, and processes exclude one another by locks that the kernel
releases when their holder dies. No shared memory is used, so a run that was killed leaves nothing behind that
the next one would have to clean.
"""

from __future__ import annotations

import hashlib
import json
import os
import tempfile
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from filelock import FileLock
from numpy.typing import NDArray
from streaming import Stream
from streaming.base.format import reader_from_json

from dbrx_train.data.apportion import Ints

__all__ = ["ShardCache", "ShardStore", "Source"]

_INDEX = "index.json"
_RETRIES = 5


@dataclass(frozen=True)
class Source:
    """Where a source's shards lie: ``local``/``split``, fetched there from ``remote``/``split`` if given."""

    local: str
    remote: str | None = None
    split: str = "train"


class ShardStore:
    """Random access to the samples of one source; safe to use from many threads and processes at once."""

    def __init__(self, name: str, source: Source) -> None:
        """Read the index. Raises ValueError, naming the source, if it is missing, damaged or empty."""
        self.name, self.source = name, source
        self.folder = Path(source.local, source.split)
        self.stream = Stream(
            local=source.local,
            remote=source.remote,
            split=source.split,
            download_retry=2,
            download_timeout=60,
            keep_zip=False,
        )
        self._index: list[tuple[int, bytes]] = self._read_index()
        self.samples_per_shard: Ints = np.array([samples for samples, _ in self._index], np.int64)
        self.first_sample: Ints = np.cumsum(self.samples_per_shard) - self.samples_per_shard
        if not self.samples_per_shard.sum():
            raise ValueError(
                f"sources.{name}: {self.folder / _INDEX} lists no samples; prepare the data again"
            )
        key = hashlib.sha256(os.path.abspath(self.folder).encode()).hexdigest()[:16]
        self._locks = Path(tempfile.gettempdir(), f"dbrx-train-{os.getuid()}", key)
        self._readers: dict[int, Any] = {}

    def _read_index(self) -> list[tuple[int, bytes]]:
        """Samples and description of every shard; the descriptions stay packed, for there may be many."""
        path = self.folder / _INDEX
        try:
            if self.source.remote is not None:
                # Each process fetches its own copy: the cached one may lack shards that were appended since.
                fetched = self.stream._download_file(_INDEX, f"{_INDEX}.{os.getpid()}")
                os.replace(fetched, path)
            with path.open() as file:
                return list(json.load(file, object_hook=_pack)["shards"])
        except (OSError, KeyError, TypeError, json.JSONDecodeError) as error:
            problem = (
                "does not exist" if isinstance(error, FileNotFoundError) else f"cannot be read ({error})"
            )
            raise ValueError(f"sources.{self.name}: {path} {problem}; prepare the data again") from None

    def fingerprint(self, begin: int, end: int) -> str:
        """Identity of the data in shards [begin, end), wherever they lie: names, sizes and hashes."""
        return hashlib.sha256(b"\n".join(packed for _, packed in self._index[begin:end])).hexdigest()

    def prepare(self, shard: int) -> bool:
        """See to it that the shard lies unpacked in the local folder. Returns whether it had to be made."""
        reader = self._reader(shard)
        path = self.folder / reader.raw_data.basename
        if path.exists():
            if self.source.remote is not None:
                os.utime(path)
            return False
        lock = self._locks / f"{reader.raw_data.basename}.lock"
        lock.parent.mkdir(parents=True, exist_ok=True)
        with FileLock(lock):
            if not path.exists():
                self._check_obtainable(reader)
                self.stream.prepare_shard(reader)
        return True

    def _check_obtainable(self, reader: Any) -> None:
        packed = reader.zip_data and self.folder / reader.zip_data.basename
        if self.source.remote is None and not (packed and packed.exists()):
            missing = packed or self.folder / reader.raw_data.basename
            raise ValueError(f"sources.{self.name}: {missing} is missing; prepare the data again")

    def read(self, shard: int, index: int) -> NDArray[np.int64]:
        """A sample's tokens, as an array of one's own: [sequence]."""
        for _ in range(_RETRIES):
            try:
                return np.array(self._reader(shard)[index]["tokens"], np.int64)
            except FileNotFoundError:
                self.prepare(shard)
        raise RuntimeError(
            f"sources.{self.name}: shard {shard} is evicted as fast as fetched; raise cache_limit"
        )

    def evictable(self) -> list[Path]:
        """Local files that can be had again: all of a remote's, else unpacked ones beside packed ones."""
        here = self.folder.rglob("*")
        files = [p for p in here if p.is_file() and not p.name.startswith(_INDEX) and p.suffix != ".tmp"]
        if self.source.remote is not None:
            return files
        packed = {path.with_suffix("") for path in files if path.suffix != ".mds"}
        return [path for path in files if path in packed]

    def _reader(self, shard: int) -> Any:
        if shard not in self._readers:
            description = json.loads(self._index[shard][1])
            self._readers[shard] = reader_from_json(self.source.local, self.source.split, description)
        return self._readers[shard]


class ShardCache:
    """Keeps what several sources hold locally under a limit in bytes, dropping what was used least lately."""

    def __init__(self, stores: Sequence[ShardStore], limit: int) -> None:
        self.stores, self.limit = stores, limit

    def shrink(self) -> None:
        """Drop the files used least recently until the limit holds."""
        for_all = Path(tempfile.gettempdir(), f"dbrx-train-{os.getuid()}")
        for_all.mkdir(parents=True, exist_ok=True)
        with FileLock(for_all / "cache.lock"):
            found = [(path, path.stat()) for store in self.stores for path in store.evictable()]
            total = sum(stat.st_size for _, stat in found)
            for path, stat in sorted(found, key=lambda pair: pair[1].st_mtime):
                if total <= self.limit:
                    return
                path.unlink(missing_ok=True)
                total -= stat.st_size


def _pack(item: dict[str, Any]) -> Any:
    return (item["samples"], json.dumps(item, sort_keys=True).encode()) if "samples" in item else item
