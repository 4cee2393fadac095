"""A prepared folder in words: what is in it, how long its documents are, what a sample looks like."""

from __future__ import annotations

import itertools
import json
import os
import re
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from dbrx_train.data.manifest import Manifest, Split, check_dataset, read_manifest
from dbrx_train.data.mds import INDEX, read_shard
from dbrx_train.data.origins import Origin, read_origins
from dbrx_train.data.prepare.identity import names_of
from dbrx_train.data.tokenizer import CL100K, Tokenizer, load_tokenizer

__all__ = ["inspect", "inspect_sample"]

BOUNDARY = "──────── end of document ────────"
MASKED = "⟦", "⟧"
"""Around what a conversation's sample is not trained on."""
_BAR = 40
_SHOWN = 20
"""Documents of a sample whose places are shown."""
_CONTROL = re.compile("[\x00-\x08\x0b-\x1f\x7f-\x9f]")


def inspect(
    folder: str | os.PathLike[str],
    split: str | None = None,
    sample: int | None = None,
    vocab_file: str | None = None,
    characters: int = 2000,
) -> str:
    """Describe a prepared folder, for people.

    Args:
        folder: what ``data prepare`` made.
        split: whose document lengths and sample to show; None for ``train``, or for all that there is.
        sample: which one; None for the first that holds the end of a document.
        vocab_file: the vocabulary file that the folder was prepared with, if any.
        characters: of the sample's text to show at most.

    Raises:
        ValueError: the folder is not whole, or has no such split or sample.
    """
    if split is None:
        split = "train" if "train" in read_manifest(folder).splits else "val"
    manifest = check_dataset(folder, None, split=split)
    documents = "conversations" if manifest.chat else "documents"
    lines = [f"{folder}: {manifest.tokenizer}, samples of {manifest.seq_len:,} tokens", "", "sources"]
    for source in manifest.sources:
        lines.append(f"  {source['given']}: {source['files']:,} files, {source['bytes'] / 1e6:,.2f} MB")
    if manifest.governance:
        lines.append(f"  {manifest.governance}")
    lines += [f"  curated: {each.path}, recipe {each.recipe}" for each in manifest.curation]
    lines += ["", "splits"]
    lines += [f"  {name}: {_totals(part, documents)}" for name, part in manifest.splits.items()]
    if manifest.problems:
        lines += ["", "problems"]
        for kind, problem in manifest.problems.items():
            lines.append(f"  {kind}: {problem.count:,}, first {', '.join(problem.examples)}")
    lines += ["", f"{documents} of {split} by length in tokens", *_histogram(manifest.splits[split].lengths)]
    lines += ["", *_sample(folder, manifest, split, sample, vocab_file, characters)]
    return "\n".join(lines)


def inspect_sample(
    folder: str | os.PathLike[str], sample: int, vocab_file: str | None = None, characters: int = 500
) -> str:
    """One sample to train on, alone, as ``inspect`` shows it; raises as that."""
    manifest = check_dataset(folder, None)
    return "\n".join(_sample(folder, manifest, "train", sample, vocab_file, characters))


def _sample(
    folder: str | os.PathLike[str],
    manifest: Manifest,
    split: str,
    sample: int | None,
    vocab_file: str | None,
    characters: int,
) -> list[str]:
    tokenizer = _tokenizer(manifest, vocab_file)
    picked = _pick(Path(folder, split), manifest, split, sample, tokenizer)
    index, tokens, loss, documents_of = picked
    title = f"sample {index:,} of {split}"
    if loss is not None:
        title += (
            f": {int(loss.sum()):,} of {len(tokens):,} tokens are trained on, not those in {' '.join(MASKED)}"
        )
    text = _decoded(tokens, loss, manifest.tokenizer, tokenizer, characters)
    return [title, *_places(documents_of), *text]


def _totals(split: Split, documents: str) -> str:
    documents = documents.removesuffix("s") if split.documents == 1 else documents
    per_token = split.text_bytes / max(1, split.tokens - split.documents)
    return (
        f"{split.documents:,} {documents}, {split.tokens:,} tokens, {per_token:.2f} bytes per token, "
        f"{split.samples:,} samples"
    )


def _histogram(lengths: list[int]) -> Iterator[str]:
    first = next((power for power, count in enumerate(lengths) if count), 0)
    for power in range(first, len(lengths)):
        label = f"{1 << power:,} to {(2 << power) - 1:,}"
        bar = "█" * -(-lengths[power] * _BAR // max(lengths))
        yield f"  {label:>27} {lengths[power]:>10,} {bar}".rstrip()


def _tokenizer(manifest: Manifest, vocab_file: str | None) -> Tokenizer | None:
    """That which the folder was prepared with; None if it is not at hand."""
    if vocab_file is None and manifest.tokenizer != CL100K:
        return None
    tokenizer = load_tokenizer(manifest.tokenizer, vocab_file)
    return tokenizer if tokenizer.fingerprint == manifest.tokenizer_fingerprint else None


class _Sample(NamedTuple):
    number: int
    tokens: NDArray[np.uint32]
    """[seq_len]"""
    loss: NDArray[np.uint8] | None
    """The loss mask, [seq_len], if it has one."""
    documents: list[tuple[int, Origin]] | None
    """Each one's first token here, and where it was read."""


def _pick(
    folder: Path, manifest: Manifest, split: str, wanted: int | None, tokenizer: Tokenizer | None
) -> _Sample:
    samples = manifest.splits[split].samples
    if wanted is not None and not 0 <= wanted < samples:
        raise ValueError(f"sample: {wanted} does not exist; {split} has samples 0 to {samples - 1}")
    first, part, begin = 0, Path(), 0
    for shard in json.loads((folder / INDEX).read_text(encoding="utf-8"))["shards"]:
        home = (folder / shard["raw_data"]["basename"]).parent
        if home != part:
            part, begin = home, first
        if wanted is None or wanted < first + shard["samples"]:
            rows = read_shard(folder, shard)
            row = 0 if wanted is None else wanted - first
            if wanted is None and tokenizer is not None:
                row = int((rows == tokenizer.eos_id).any(axis=1).argmax())
            loss = read_shard(folder, shard, "loss")[row] if "loss" in shard["column_names"] else None
            at = (first + row - begin) * manifest.seq_len
            documents = read_origins(part, at, at + manifest.seq_len)
            return _Sample(first + row, rows[row], loss, documents)
        first += shard["samples"]
    raise AssertionError("the index was checked to hold every sample")


def _places(documents: list[tuple[int, Origin]] | None) -> Iterator[str]:
    """Where the sample's documents were read."""
    if documents is None:
        yield "  (from which documents is not known: it was prepared by an earlier version)"
        return
    names = names_of([origin for _, origin in documents[:_SHOWN]])
    for token, origin in documents[:_SHOWN]:
        try:
            place = origin()
        except OSError:  # the line can only be counted where the file is
            place = f"{origin.path}, line {origin.number} after byte {origin.start}"
        named = f" ({names[origin]})" if origin in names else ""
        yield f"  from token {token:,}: {place}{named}"
    if len(documents) > _SHOWN:
        yield f"  … and {len(documents) - _SHOWN:,} more"


def _decoded(
    tokens: NDArray[np.uint32],
    loss: NDArray[np.uint8] | None,
    name: str,
    tokenizer: Tokenizer | None,
    characters: int,
) -> Iterator[str]:
    if tokenizer is None:
        yield f"  (not decoded: it needs the vocabulary file of {name!r} that it was prepared with)"
        return
    padding = int((tokens == tokenizer.pad_id).sum()) if loss is not None else 0
    real = len(tokens) - padding
    ends = np.flatnonzero(tokens == tokenizer.eos_id) + 1
    mask = np.ones(len(tokens), np.uint8) if loss is None else loss
    text = f"\n{BOUNDARY}\n".join(
        _text(tokens[begin:end], mask[begin:end], tokenizer)
        for begin, end in itertools.pairwise([0, *ends[ends < real], real])
    )
    shown = _CONTROL.sub(lambda match: f"\\x{ord(match[0]):02x}", text[:characters])
    yield from (f"  │ {line}" for line in shown.split("\n"))
    if len(text) > characters:
        yield f"  … and {len(text) - characters:,} characters more"
    if padding:
        yield f"  … and {padding:,} tokens of padding"


def _text(tokens: NDArray[np.uint32], mask: NDArray[np.uint8], tokenizer: Tokenizer) -> str:
    """A document's text, without its end, with marks around what is masked."""
    kept = tokens != tokenizer.eos_id
    tokens, mask = tokens[kept], mask[kept]
    turns = np.flatnonzero(np.diff(mask)) + 1
    parts = []
    for begin, end in itertools.pairwise([0, *turns, len(tokens)]):
        text = tokenizer.decode(tokens[begin:end].tolist())
        parts.append(text if mask[begin:end].all() else text.join(MASKED))
    return "".join(parts)
