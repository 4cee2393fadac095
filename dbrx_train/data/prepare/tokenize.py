"""One part of the input, from text to shards: what each worker process does."""

from __future__ import annotations

import math
import shutil
from collections.abc import Iterator
from dataclasses import dataclass, field
from hashlib import blake2b
from pathlib import Path
from typing import Any

import numpy as np

from dbrx_train.data.manifest import write_json
from dbrx_train.data.mds import COLUMNS, MASKED_COLUMNS, ShardWriter
from dbrx_train.data.origins import Origin
from dbrx_train.data.prepare.conversations import ChatFormat, Conversation, conversations
from dbrx_train.data.prepare.documents import cut, documents
from dbrx_train.data.prepare.holding_out import MOST_DRAWS
from dbrx_train.data.prepare.packing import Packer, WholePacker
from dbrx_train.data.prepare.problems import ProblemLog
from dbrx_train.data.prepare.sources import Part
from dbrx_train.data.prepare.text_template import TextTemplate
from dbrx_train.data.prepare.workers import Meter
from dbrx_train.data.tokenizer import Tokenizer

__all__ = ["SPLITS", "Job", "run_part"]

SPLITS = ("train", "val")
_HASHED_CHARACTERS = 1 << 16


@dataclass(frozen=True)
class Job:
    """What is the same for every part."""

    out: Path
    work: Path
    tokenizer: Tokenizer
    seq_len: int
    template: TextTemplate
    val_fraction: float
    chat: ChatFormat | None = None
    """How lines are read as conversations; None for text."""

    def mark(self, index: int) -> Path:
        """The file that says that a part is done, and what it gave."""
        return self.work / f"part-{index:05}.json"

    def packer(self, folder: Path) -> Packer | WholePacker:
        """Packs samples into shards in ``folder``."""
        if self.chat is None:
            return Packer(ShardWriter(folder, self.seq_len, COLUMNS), self.seq_len)
        pad_id = self.tokenizer.pad_id
        return WholePacker(ShardWriter(folder, self.seq_len, MASKED_COLUMNS), self.seq_len, pad_id)


@dataclass
class _Split:
    """What a part gives to one split."""

    packer: Packer | WholePacker
    documents: int = 0
    text_bytes: int = 0
    lengths: list[int] = field(default_factory=lambda: [0] * 48)

    drawn: dict[float, int] = field(default_factory=dict)
    """Tokens of the documents with the lowest draws."""

    def end_document(self, tokens: int, draw: float) -> None:
        self.documents += 1
        self.drawn[draw] = self.drawn.get(draw, 0) + tokens
        if len(self.drawn) > MOST_DRAWS:
            del self.drawn[max(self.drawn)]
        self.lengths[int(math.log2(tokens))] += 1

    def close(self) -> dict[str, Any]:
        rest = self.packer.close()
        return {
            "documents": self.documents,
            "tokens": self.packer.tokens,
            "text_bytes": self.text_bytes,
            "lengths": self.lengths,
            "drawn": sorted(self.drawn.items()),
            "rest": rest,
            "shards": self.packer.shards,
        }


def run_part(job: Job, index: int, part: Part, meter: Meter) -> None:
    """Tokenize a part into ``OUT/SPLIT/INDEX/`` and mark it done, last.

    What an earlier, interrupted try left there is removed first. Tokens that do not fill a sample are
    kept in the mark, for the samples packed from what all parts leave.
    """
    splits: dict[str, _Split] = {}
    for name in SPLITS:
        folder = job.out / name / f"{index:05}"
        shutil.rmtree(folder, ignore_errors=True)
        splits[name] = _Split(job.packer(folder))
    log = ProblemLog(meter)
    for span in part:
        if job.chat is not None:
            for conversation in conversations(span, job.chat, job.tokenizer, job.seq_len, log):
                _add_conversation(job, splits, conversation, meter)
            continue
        for where, chunks in documents(span, job.template, log):
            if not _add_document(job, splits, where, chunks, meter):
                log.problem("empty", where)
    results = {name: split.close() for name, split in splits.items()}
    for result in results.values():
        for shard in result["shards"]:
            for form in ("raw_data", "zip_data"):
                shard[form]["basename"] = f"{index:05}/{shard[form]['basename']}"
    write_json(job.mark(index), {"splits": results, "problems": log.problems})


def _add_document(
    job: Job, splits: dict[str, _Split], origin: Origin, chunks: Iterator[str], meter: Meter
) -> bool:
    """Tokenize one document into its split; False if there is nothing but blanks in it."""
    split, tokens = None, 0
    for piece in cut(chunks):
        if split is None:
            if not piece.strip():
                continue
            draw = _draw(piece)
            split = splits["val" if draw < job.val_fraction else "train"]
            packer = split.packer
            assert isinstance(packer, Packer)
            packer.begin(origin)
        assert isinstance(packer, Packer)
        ids = job.tokenizer.encode_array(piece)
        packer.add(ids)
        split.text_bytes += len(piece) if piece.isascii() else len(piece.encode())
        tokens += len(ids)
        meter.add(made=len(ids))
    if split is None:
        return False
    assert isinstance(packer, Packer)
    packer.add(np.array([job.tokenizer.eos_id], dtype=np.uint32))
    split.end_document(tokens + 1, draw)
    meter.add(made=1)
    return True


def _add_conversation(job: Job, splits: dict[str, _Split], conversation: Conversation, meter: Meter) -> None:
    draw = _draw(conversation.question)
    split = splits["val" if draw < job.val_fraction else "train"]
    assert isinstance(split.packer, WholePacker)
    split.packer.add(conversation.tokens, conversation.loss, conversation.origin)
    split.text_bytes += conversation.text_bytes
    split.end_document(len(conversation.tokens), draw)
    meter.add(made=len(conversation.tokens))


def _draw(text: str) -> float:
    """A number in [0, 1) that the document's beginning decides, whatever else is in the corpus."""
    digest = blake2b(text[:_HASHED_CHARACTERS].encode(), digest_size=8).digest()
    return int.from_bytes(digest, "big") / 2**64
