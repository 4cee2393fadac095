"""A prepared folder in words: what is in it, how long its documents are, what a sample looks like."""

from __future__ import annotations

import json
import os
import re
from collections.abc import Iterator
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from dbrx_train.data.manifest import Manifest, Split, check_dataset
from dbrx_train.data.mds import INDEX, read_shard
from dbrx_train.data.tokenizer import Tokenizer, load_tokenizer

__all__ = ["inspect"]

BOUNDARY = "──────── end of document ────────"
_BAR = 40
_CONTROL = re.compile("[\x00-\x08\x0b-\x1f\x7f-\x9f]")


def inspect(
    folder: str | os.PathLike[str],
    split: str = "train",
    sample: int | None = None,
    vocab_file: str | None = None,
    characters: int = 2000,
) -> str:
    """Describe a prepared folder, for people.

    Args:
        folder: what ``data prepare`` made.
        split: whose document lengths and sample to show.
        sample: which one; None for the first that holds the end of a document.
        vocab_file: the vocabulary file that the folder was prepared with, if any.
        characters: of the sample's text to show at most.

    Raises:
        ValueError: the folder is not whole, or has no such split or sample.
    """
    manifest = check_dataset(folder, None, split=split)
    lines = [f"{folder}: {manifest.tokenizer}, samples of {manifest.seq_len:,} tokens", "", "sources"]
    for source in manifest.sources:
        lines.append(f"  {source['given']}: {source['files']:,} files, {source['bytes'] / 1e6:,.2f} MB")
    lines += ["", "splits"]
    lines += [f"  {name}: {_totals(part)}" for name, part in manifest.splits.items()]
    if manifest.problems:
        lines += ["", "problems"]
        for kind, problem in manifest.problems.items():
            lines.append(f"  {kind}: {problem.count:,}, first {', '.join(problem.examples)}")
    lines += ["", f"documents of {split} by length in tokens", *_histogram(manifest.splits[split].lengths)]
    index, tokens = _pick(Path(folder, split), manifest, split, sample)
    lines += ["", f"sample {index:,} of {split}", *_decoded(tokens, manifest, vocab_file, characters)]
    return "\n".join(lines)


def _totals(split: Split) -> str:
    per_token = split.text_bytes / max(1, split.tokens - split.documents)
    return (
        f"{split.documents:,} documents, {split.tokens:,} tokens, {per_token:.2f} bytes per token, "
        f"{split.samples:,} samples"
    )


def _histogram(lengths: list[int]) -> Iterator[str]:
    first = next((power for power, count in enumerate(lengths) if count), 0)
    for power in range(first, len(lengths)):
        label = f"{1 << power:,} to {(2 << power) - 1:,}"
        bar = "█" * -(-lengths[power] * _BAR // max(lengths))
        yield f"  {label:>27} {lengths[power]:>10,} {bar}".rstrip()


def _pick(folder: Path, manifest: Manifest, split: str, wanted: int | None) -> tuple[int, NDArray[np.uint32]]:
    """A sample's number and its tokens, of shape [seq_len]."""
    samples = manifest.splits[split].samples
    if wanted is not None and not 0 <= wanted < samples:
        raise ValueError(f"sample: {wanted} does not exist; {split} has samples 0 to {samples - 1}")
    first = 0
    for shard in json.loads((folder / INDEX).read_text(encoding="utf-8"))["shards"]:
        if wanted is None:
            rows = read_shard(folder, shard)
            with_end = (rows == Tokenizer.eos_id).any(axis=1)
            chosen = int(with_end.argmax())
            return chosen, rows[chosen]
        if wanted < first + shard["samples"]:
            return wanted, read_shard(folder, shard)[wanted - first]
        first += shard["samples"]
    raise AssertionError("the index was checked to hold every sample")


def _decoded(
    tokens: NDArray[np.uint32], manifest: Manifest, vocab_file: str | None, characters: int
) -> Iterator[str]:
    name = manifest.tokenizer
    tokenizer = load_tokenizer(name, vocab_file) if vocab_file or name == "cl100k_base" else None
    if tokenizer is None or tokenizer.fingerprint != manifest.tokenizer_fingerprint:
        yield f"  (not decoded: it needs the vocabulary file of {name!r} that it was prepared with)"
        return
    ends = np.flatnonzero(tokens == tokenizer.eos_id)
    documents = np.split(tokens, ends + 1)
    text = f"\n{BOUNDARY}\n".join(
        tokenizer.decode(ids[ids != tokenizer.eos_id].tolist()) for ids in documents
    )
    shown = _CONTROL.sub(lambda match: f"\\x{ord(match[0]):02x}", text[:characters])
    yield from (f"  │ {line}" for line in shown.split("\n"))
    if len(text) > characters:
        yield f"  … and {len(text) - characters:,} characters more"
