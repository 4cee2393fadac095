"""One source's shards: fetched, unpacked, cached and read through mosaicml-streaming's Stream.

What is present is what the file system shows, and processes exclude one another by locks that the kernel
releases when their holder dies. No shared memory is used, so a run that was killed leaves nothing behind that
the next one would have to clean.
"""

from __future__ import annotations

import errno
import hashlib
import json
import os
import tempfile
from collections.abc import Iterator, Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from filelock import FileLock
from numpy.typing import NDArray
from streaming import Stream
from streaming.base.format import reader_from_json
from streaming.base.hashing import get_hash

from dbrx_train.data.manifest import fetch
from dbrx_train.data.mds import INDEX, IndexEntry, fingerprint, read_index
from dbrx_train.data.mix.apportionment import Ints
from dbrx_train.data.untrusted import check_shard

__all__ = ["DataError", "ShardCache", "ShardStore", "Source"]

_RETRIES = 5
_UNWRITABLE = {errno.EROFS, errno.EACCES, errno.EPERM, errno.ENOSPC, errno.EDQUOT}


class DataError(ValueError):
    """What is wrong with a source's data, in one line, also when a DataLoader's worker met it.

    A worker's error is made anew in the main process from a text that ends in the formatted error
    (``torch._utils.ExceptionWrapper``). Of that text this keeps the message, and the traceback as a note.
    """

    def __init__(self, message: str) -> None:
        traceback, name, line = message.rpartition(f"{__name__}.{type(self).__qualname__}: ")
        super().__init__(" ".join(line.split()))
        if name:
            self.add_note(traceback.rstrip())


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
        self._index = self._read_index()
        self.samples_per_shard: Ints = np.array([samples for samples, _ in self._index], np.int64)
        self.first_sample: Ints = np.cumsum(self.samples_per_shard) - self.samples_per_shard
        if not self.samples_per_shard.sum():
            raise ValueError(
                f"sources.{name}: {self.folder / INDEX} lists no samples; prepare the data again"
            )
        key = hashlib.sha256(os.path.abspath(self.folder).encode()).hexdigest()[:16]
        self._locks = _temporary_folder() / key
        self._spare = self._locks / "unpacked"
        self._writable = True
        self._readers: dict[int, Any] = {}
        self._sound: dict[int, Path] = {}
        """Unpacked shards whose content this process has held against its hash."""

    def _read_index(self) -> list[IndexEntry]:
        path = self.folder / INDEX
        if self.source.remote is not None:
            # The cached copy may lack shards that were appended since.
            try:
                fetch(os.path.join(self.source.remote, self.source.split, INDEX), path)
            except ValueError as error:
                raise DataError(f"sources.{self.name}: {error}") from error
        try:
            return read_index(self.folder)
        except (OSError, KeyError, TypeError, json.JSONDecodeError) as error:
            problem = (
                "does not exist" if isinstance(error, FileNotFoundError) else f"cannot be read ({error})"
            )
            raise ValueError(f"sources.{self.name}: {path} {problem}; prepare the data again") from None

    def fingerprint(self, begin: int, end: int) -> str:
        """Identity of the data in shards [begin, end), wherever they lie: names, sizes and hashes."""
        return fingerprint(self._index[begin:end])

    def prepare(self, shard: int) -> bool:
        """See to it that the shard lies unpacked where it can be read. Returns whether it had to be made.

        That is the local folder; or, if what lies packed there can only be read, a temporary one, which later
        runs find again. Raises DataError, naming the source, if the shard cannot be had.
        """
        try:
            if path := self._find(shard):
                if self.source.remote is not None or path.is_relative_to(self._spare):
                    with suppress(FileNotFoundError):  # dropped just now; reading makes it anew
                        os.utime(path)
                return False
            lock = self._locks / f"{self._reader(shard).raw_data.basename}.lock"
            lock.parent.mkdir(parents=True, exist_ok=True)
            with FileLock(lock):
                if not self._find(shard):
                    self._make(shard)
            return True
        except DataError:
            raise
        except Exception as error:  # zstd and every cloud's SDK have errors of their own
            reader = self._reader(shard)
            path = Path(self.source.split, (reader.zip_data or reader.raw_data).basename)
            raise DataError(
                f"sources.{self.name}: {path} cannot be had from {self.source.remote or self.source.local} "
                f"({_line(error)}); restore it, or prepare the data again"
            ) from error

    def _find(self, shard: int) -> Path | None:
        """The unpacked shard, wherever it lies sound; its reader is pointed there."""
        reader = self._reader(shard)
        for home in self._homes(shard):
            path: Path = home / reader.raw_data.basename
            if self._is_sound(shard, path):
                reader.dirname = str(home)
                return path
        return None

    def _homes(self, shard: int) -> tuple[Path, Path]:
        """The folders below which the unpacked shard may lie."""
        return self.folder, self._spare_home(shard)

    def _is_sound(self, shard: int, path: Path) -> bool | None:
        """Whether an unpacked shard holds what its index says; each process looks once, at some GB/s.

        None if it is not there, or is dropped at this moment.
        """
        if not path.exists():
            return None
        if self._sound.get(shard) != path:
            hashes = self._reader(shard).raw_data.hashes
            try:
                content = path.read_bytes() if hashes else b""
            except FileNotFoundError:
                return None
            if any(get_hash(kind, content) != known for kind, known in hashes.items()):
                return False
            self._sound[shard] = path
        return True

    def _make(self, shard: int) -> None:
        reader = self._reader(shard)
        if (damaged := self.folder / reader.raw_data.basename).exists():
            if self.source.remote is None and not self._is_packed(reader):
                raise DataError(
                    f"sources.{self.name}: {damaged} is damaged: its content is not what was written; "
                    f"restore it"
                )
            with suppress(OSError):  # a folder that can only be read
                damaged.unlink()
        if self.source.remote is not None:
            self.stream.prepare_shard(reader)
        elif not self._is_packed(reader):
            missing = self.folder / (reader.zip_data or reader.raw_data).basename
            raise DataError(f"sources.{self.name}: {missing} is missing; prepare the data again")
        elif not (self._writable and self._unpack(reader, self.folder)):
            self._writable = False
            home = self._spare_home(shard)
            if not self._unpack(reader, home):
                raise DataError(
                    f"sources.{self.name}: neither {self.folder} nor {home} can take the unpacked shards; "
                    f"set TMPDIR to a folder with room, or cache_limit"
                )
        # One that is gone was dropped again just now: whoever reads it makes it anew.
        unpacked = (home / reader.raw_data.basename for home in self._homes(shard))
        if any(self._is_sound(shard, path) is False for path in unpacked):
            where = self.source.remote or self.folder
            name = (reader.zip_data or reader.raw_data).basename
            raise DataError(
                f"sources.{self.name}: {name} in {where} is damaged: its content is not what was written; "
                f"restore it, or prepare the data again"
            )

    def _is_packed(self, reader: Any) -> bool:
        return bool(reader.zip_data and (self.folder / reader.zip_data.basename).exists())

    def _unpack(self, reader: Any, home: Path) -> bool:
        """Unpack a shard from the local folder into ``home``; False if that is read-only or full."""
        packed, raw = self.folder / reader.zip_data.basename, home / reader.raw_data.basename
        try:
            raw.parent.mkdir(parents=True, exist_ok=True)
            self.stream._decompress_shard_part(reader.zip_data, str(packed), str(raw), reader.compression)
        except OSError as error:
            with suppress(OSError):
                Path(f"{raw}.tmp").unlink()
            if error.errno not in _UNWRITABLE or error.filename == str(packed):
                raise
            return False
        return True

    def _spare_home(self, shard: int) -> Path:
        # One for each content, as other data may have been prepared in this place before
        return self._spare / hashlib.sha256(self._index[shard][1]).hexdigest()[:16]

    def read(self, shard: int, index: int) -> dict[str, NDArray[Any]]:
        """A sample: ``tokens``, int64 [sequence], and a ``loss`` mask, bool, where the shard has one.

        The arrays are one's own. Raises DataError if it cannot be read.
        """
        reader = self._reader(shard)
        if shard not in self._sound:
            self.prepare(shard)
        for _ in range(_RETRIES):
            try:
                sample = reader[index]
                mask = {"loss": sample["loss"].astype(bool)} if "loss" in sample else {}
                return {"tokens": np.array(sample["tokens"], np.int64), **mask}
            except FileNotFoundError:
                self.prepare(shard)
            except (OSError, ValueError, LookupError) as error:
                path = Path(reader.dirname, reader.raw_data.basename)
                raise DataError(
                    f"sources.{self.name}: {path} is damaged at sample {index} ({_line(error)}); restore it"
                ) from error
        raise DataError(f"cache_limit: shards of {self.name} are dropped as fast as made ready; raise it")

    def evictable(self) -> Iterator[Path]:
        """Unpacked shards that can be had again: from the remote, or from packed ones that lie here."""
        yield from (path for path in _files(self._spare) if path.suffix == ".mds")
        if os.access(self.folder, os.W_OK):
            files = _files(self.folder)
            packed = {path.with_suffix("") for path in files if path.suffix != ".mds"}
            unpacked = (path for path in files if path.suffix == ".mds")
            yield from (path for path in unpacked if self.source.remote is not None or path in packed)

    def _reader(self, shard: int) -> Any:
        if shard not in self._readers:
            description = json.loads(self._index[shard][1])
            try:
                check_shard(self.folder / INDEX, description)
            except ValueError as error:
                raise DataError(f"sources.{self.name}: {error}") from None
            self._readers[shard] = reader_from_json(str(self.folder), None, description)
        return self._readers[shard]


class ShardCache:
    """Keeps what several sources hold locally under a limit in bytes, dropping what was used least lately."""

    def __init__(self, stores: Sequence[ShardStore], limit: int) -> None:
        self.stores, self.limit = stores, limit

    def shrink(self) -> None:
        """Drop the files used least recently until the limit holds. Raises DataError if they cannot be."""
        for_all = _temporary_folder()
        try:
            for_all.mkdir(parents=True, exist_ok=True)
            with FileLock(for_all / "cache.lock"):
                self._shrink()
        except OSError as error:
            raise DataError(f"cache_limit: files cannot be dropped ({_line(error)}); leave it out") from error

    def _shrink(self) -> None:
        found = []
        for path in (path for store in self.stores for path in store.evictable()):
            with suppress(FileNotFoundError):  # another process unpacked and dropped it just now
                found.append((path, path.stat()))
        total = sum(stat.st_size for _, stat in found)
        for path, stat in sorted(found, key=lambda pair: pair[1].st_mtime):
            if total <= self.limit:
                return
            path.unlink(missing_ok=True)
            total -= stat.st_size


def _temporary_folder() -> Path:
    return Path(tempfile.gettempdir(), f"dbrx-train-{os.getuid()}")


def _files(folder: Path) -> set[Path]:
    # Unlike rglob, walk bears with folders that vanish
    return {Path(where, name) for where, _, names in os.walk(folder) for name in names}


def _line(error: Exception) -> str:
    return " ".join(str(error).split()) or type(error).__name__
