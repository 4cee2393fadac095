"""One part of the input, from text to shards: what each worker process does."""

from __future__ import annotations

import json
import math
import shutil
from collections.abc import Iterator
from dataclasses import dataclass, field
from hashlib import blake2b
from pathlib import Path
from typing import Any, Protocol

import numpy as np
from numpy.typing import NDArray

from dbrx_train.data.documents import Place, cut, documents
from dbrx_train.data.manifest import write_json
from dbrx_train.data.mds import ShardWriter
from dbrx_train.data.sources import Part
from dbrx_train.data.tokenizer import Tokenizer

__all__ = ["EXAMPLES", "SPLITS", "Job", "Meter", "Packer", "has_marks", "read_mark", "run_part"]

SPLITS = ("train", "val")
EXAMPLES = 5
"""Places named for each kind of problem."""

_HASHED_CHARACTERS = 1 << 16


class Meter(Protocol):
    """Hears how far a worker is; raises to make it stop."""

    def add(self, *, size: int = 0, tokens: int = 0) -> None:
        """``size`` more bytes read, ``tokens`` more made."""


@dataclass(frozen=True)
class Job:
    """What is the same for every part."""

    out: Path
    work: Path
    tokenizer: Tokenizer
    seq_len: int
    text_field: str
    val_fraction: float


class Packer:
    """Packs documents of any length, one after the other, into samples of ``seq_len`` tokens."""

    def __init__(self, writer: ShardWriter, seq_len: int) -> None:
        self._writer = writer
        self._seq_len = seq_len
        self._held: list[NDArray[np.uint32]] = []
        self._size = 0
        self.tokens = 0
        """Tokens added so far."""

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

    def close(self) -> list[int]:
        """Close the last shard; returns the tokens left over, fewer than ``seq_len``."""
        self._writer.close()
        return [int(token) for ids in self._held for token in ids]


@dataclass
class _Split:
    """What a part gives to one split."""

    writer: ShardWriter
    packer: Packer
    documents: int = 0
    text_bytes: int = 0
    lengths: list[int] = field(default_factory=lambda: [0] * 48)

    def end_document(self, tokens: int) -> None:
        self.documents += 1
        self.lengths[int(math.log2(tokens))] += 1

    def close(self) -> dict[str, Any]:
        rest = self.packer.close()
        return {
            "documents": self.documents,
            "tokens": self.packer.tokens,
            "text_bytes": self.text_bytes,
            "lengths": self.lengths,
            "rest": rest,
            "shards": self.writer.shards,
        }


class _Log:
    """The readers' listener: passes progress on, counts problems and keeps the first few places."""

    def __init__(self, meter: Meter) -> None:
        self._meter = meter
        self.problems: dict[str, dict[str, Any]] = {}

    def advance(self, size: int) -> None:
        self._meter.add(size=size)

    def problem(self, kind: str, where: Place) -> None:
        entry = self.problems.setdefault(kind, {"count": 0, "examples": []})
        entry["count"] += 1
        if len(entry["examples"]) < EXAMPLES:
            entry["examples"].append(where())


def _mark(work: Path, index: int) -> Path:
    """The file that says that a part is done, and what it gave."""
    return work / f"part-{index:05}.json"


def read_mark(job: Job, index: int) -> dict[str, Any] | None:
    """What a finished part gave, or None for an unfinished one."""
    path = _mark(job.work, index)
    return json.loads(path.read_text(encoding="utf-8")) if path.is_file() else None


def has_marks(work: Path) -> bool:
    """Whether any part is done."""
    return any(work.glob("part-*.json"))


def run_part(job: Job, index: int, part: Part, meter: Meter) -> None:
    """Tokenize a part into ``OUT/SPLIT/INDEX/`` and mark it done, last.

    What an earlier, interrupted try left there is removed first. Tokens that do not fill a sample are
    kept in the mark, for the samples packed from what all parts leave.
    """
    splits: dict[str, _Split] = {}
    for name in SPLITS:
        folder = job.out / name / f"{index:05}"
        shutil.rmtree(folder, ignore_errors=True)
        writer = ShardWriter(folder, job.seq_len)
        splits[name] = _Split(writer, Packer(writer, job.seq_len))
    log = _Log(meter)
    for span in part:
        for where, chunks in documents(span, job.text_field, log):
            if not _add_document(job, splits, chunks, meter):
                log.problem("empty", where)
    results = {name: split.close() for name, split in splits.items()}
    for result in results.values():
        for shard in result["shards"]:
            for form in ("raw_data", "zip_data"):
                shard[form]["basename"] = f"{index:05}/{shard[form]['basename']}"
    write_json(_mark(job.work, index), {"splits": results, "problems": log.problems})


def _add_document(job: Job, splits: dict[str, _Split], chunks: Iterator[str], meter: Meter) -> bool:
    """Tokenize one document into its split; False if there is nothing but blanks in it."""
    split, tokens = None, 0
    for piece in cut(chunks):
        if split is None:
            if not piece.strip():
                continue
            split = splits["val" if _draw(piece) < job.val_fraction else "train"]
        ids = job.tokenizer.encode_array(piece)
        split.packer.add(ids)
        split.text_bytes += len(piece) if piece.isascii() else len(piece.encode())
        tokens += len(ids)
        meter.add(tokens=len(ids))
    if split is None:
        return False
    split.packer.add(np.array([job.tokenizer.eos_id], dtype=np.uint32))
    split.end_document(tokens + 1)
    meter.add(tokens=1)
    return True


def _draw(text: str) -> float:
    """A number in [0, 1) that the document's beginning decides, whatever else is in the corpus."""
    digest = blake2b(text[:_HASHED_CHARACTERS].encode(), digest_size=8).digest()
    return int.from_bytes(digest, "big") / 2**64
