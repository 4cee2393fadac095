"""Sources of a corpus, raw, curated or prepared, and the passages that are looked at.

Of raw and curated sources every document is read, and the passages are those with the least hashes: the same
ones whatever the order, in memory for as many as are kept. Of a prepared source samples at equal distances
are decoded; its sizes and lengths are those of its manifest.
"""

from __future__ import annotations

import heapq
import itertools
import json
import math
import os
from array import array
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
import xxhash
from numpy.typing import NDArray

from dbrx_train.data.inputs import CURATION
from dbrx_train.data.manifest import MANIFEST, check_dataset
from dbrx_train.data.mds import INDEX, read_shard
from dbrx_train.data.origins import read_origins
from dbrx_train.data.prepare.documents import documents
from dbrx_train.data.prepare.records import Deaf, Place
from dbrx_train.data.prepare.sources import Span, find_files, plan_parts
from dbrx_train.data.prepare.text_template import TextTemplate
from dbrx_train.data.tokenizer import CL100K, Tokenizer, load_tokenizer
from dbrx_train.errors import seen_from

__all__ = ["PASSAGE", "Passage", "Source", "read_corpus", "sources_of"]

PASSAGE = 1000
"""Characters of a passage at most."""
_LONGEST = 1 << 20
"""Characters of a document that its key of duplicates looks at."""


@dataclass(frozen=True)
class Passage:
    """A part of a document, of at most ``PASSAGE`` characters."""

    text: str
    place: str
    """Where the document was read, for people."""


@dataclass
class Source:
    """A source, and what was found in it."""

    name: str
    path: str
    kind: str
    """raw, curated or prepared."""
    documents: int = 0
    text_bytes: int = 0
    lengths: list[int] = field(default_factory=list)
    """[i]: documents of [2^i, 2^(i+1)) characters; of a prepared source, tokens."""
    tokens: int | None = None
    """Known of a prepared source alone."""
    keys: array[int] = field(default_factory=lambda: array("Q"))
    """Of each document looked at: a hash of its words, whatever their case and what lies between them."""
    passages: list[Passage] = field(default_factory=list)


def sources_of(given: Sequence[str]) -> list[Source]:
    """The sources that folders, files and globs come to.

    A prepared folder is one; so is each that lies in a given folder, and each folder of a curated one.

    Raises:
        ValueError: one is not there.
    """
    found: list[Source] = []
    for path in given:
        folder = Path(path)
        inside = sorted(each for each in folder.iterdir() if each.is_dir()) if folder.is_dir() else []
        prepared = [each for each in (folder, *inside) if (each / MANIFEST).is_file()]
        if prepared:
            found += [Source(each.name, str(each), "prepared") for each in prepared]
        elif (folder / CURATION).is_file():
            of = [each for each in inside if not each.name.startswith(".")] or [folder]
            found += [Source(each.name, str(each), "curated") for each in of]
        elif not folder.exists() and "*" not in path:
            raise ValueError(f"{path}: no such file or folder{seen_from(path)}")
        else:
            found.append(Source(folder.stem, path, "raw"))
    names = [source.name for source in found]
    for source in found:
        if names.count(source.name) > 1:
            source.name = source.path
    return found


def read_corpus(
    sources: Sequence[Source],
    most: int,
    template: TextTemplate,
    suffixes: Sequence[str],
    vocab_file: str | None,
    advance: Callable[[str], None],
) -> None:
    """Fill the sources in: ``most`` passages in all, shared by them alike.

    Raises:
        ValueError: a source cannot be read, or needs the vocabulary that it was prepared with.
    """
    for i, source in enumerate(sources):
        left = most - sum(len(each.passages) for each in sources[:i])
        share = left // (len(sources) - i)
        if source.kind == "prepared":
            _read_prepared(source, share, vocab_file, advance)
        else:
            _read_raw(source, share, template, suffixes, advance)
        if not source.passages:
            raise ValueError(f"{source.path}: holds no text to look at")


def _read_raw(
    source: Source,
    most: int,
    template: TextTemplate,
    suffixes: Sequence[str],
    advance: Callable[[str], None],
) -> None:
    lengths = [0] * 48
    kept: list[tuple[int, int, int, str, Place]] = []
    catalog = find_files([source.path], suffixes)
    for span in itertools.chain.from_iterable(plan_parts(catalog, template)):
        for place, text in _texts(span, template):
            if not text.strip():
                continue
            source.documents += 1
            source.text_bytes += len(text.encode())
            lengths[int(math.log2(len(text)))] += 1
            key = _key(text)
            source.keys.append(key)
            for number in range(-(-len(text) // PASSAGE)):
                rank = (-_rank(key, number), -source.documents, -number)
                if len(kept) < most or rank > kept[0][:3]:
                    push = heapq.heappush if len(kept) < most else heapq.heapreplace
                    push(kept, (*rank, _window(text, number), place))
            if source.documents % 1000 == 0:
                advance(f"{source.name}: {source.documents:,} documents")
    source.lengths = _cut(lengths)
    in_order = sorted(kept, key=lambda entry: (-entry[1], -entry[2]))
    source.passages = [Passage(text, _said(place, source)) for *_, text, place in in_order]


def _texts(span: Span, template: TextTemplate) -> Iterator[tuple[Place, str]]:
    for place, pieces in documents(span, template, Deaf()):
        yield place, "".join(pieces)


def _key(text: str) -> int:
    return xxhash.xxh3_64_intdigest(" ".join(text[:_LONGEST].casefold().split()).encode())


def _rank(key: int, number: int) -> int:
    """A number that is as good as drawn, of a window of the document with this key."""
    return xxhash.xxh3_64_intdigest(key.to_bytes(8, "little"), number & 0xFFFFFFFF)


def _window(text: str, number: int) -> str:
    """A passage of a text, from the beginning of a word."""
    begin = number * PASSAGE
    at = text.find(" ", begin, begin + 100) + 1 if number else 0
    return text[max(at, begin) : max(at, begin) + PASSAGE]


def _cut(lengths: list[int]) -> list[int]:
    while lengths and not lengths[-1]:
        lengths.pop()
    return lengths


def _read_prepared(source: Source, most: int, vocab_file: str | None, advance: Callable[[str], None]) -> None:
    manifest = check_dataset(source.path, None)
    split = manifest.splits["train"]
    source.documents, source.text_bytes, source.lengths = split.documents, split.text_bytes, split.lengths
    source.tokens = split.tokens
    tokenizer = load_tokenizer(manifest.tokenizer if vocab_file else CL100K, vocab_file)
    if tokenizer.fingerprint != manifest.tokenizer_fingerprint:
        raise ValueError(f"{source.path}: was prepared with another vocabulary; --vocab-file names it")
    numbers = np.unique(np.linspace(0, split.samples - 1, min(most, split.samples)).astype(int))
    each = -(-most // len(numbers))
    for rows, places in _samples(Path(source.path, "train"), manifest.seq_len, numbers):
        for tokens, where in zip(rows, places, strict=True):
            source.passages += _passages(tokens, where, tokenizer, source, each)
        advance(f"{source.name}: {len(source.passages):,} passages")
    del source.passages[most:]


Places = list[tuple[int, Place]]


def _samples(
    folder: Path, seq_len: int, numbers: NDArray[np.int64]
) -> Iterator[tuple[NDArray[np.uint32], list[Places]]]:
    """Of each shard the samples among ``numbers``, with their documents' places."""
    first, part, begin = 0, Path(), 0
    for shard in json.loads((folder / INDEX).read_text(encoding="utf-8"))["shards"]:
        home = (folder / shard["raw_data"]["basename"]).parent
        if home != part:
            part, begin = home, first
        mine = numbers[(numbers >= first) & (numbers < first + shard["samples"])]
        if len(mine):
            places: list[Places] = [
                list(read_origins(part, (n - begin) * seq_len, (n - begin + 1) * seq_len) or [])
                for n in mine.tolist()
            ]
            yield read_shard(folder, shard)[mine - first], places
        first += shard["samples"]


def _passages(
    tokens: NDArray[np.uint32], places: Places, tokenizer: Tokenizer, source: Source, most: int
) -> list[Passage]:
    """The longest documents of a sample, up to ``most`` of them, each as a passage."""
    ends = (np.flatnonzero(tokens == tokenizer.eos_id) + 1).tolist()
    edges = list(itertools.pairwise([0, *ends, len(tokens)]))
    for begin, end in edges[1 : len(ends)]:  # those that are whole here
        source.keys.append(_key(tokenizer.decode(tokens[begin : end - 1].tolist())))
    found = []
    for begin, end in sorted(edges, key=lambda edge: edge[0] - edge[1])[:most]:
        kept = tokens[begin:end]
        kept = kept[(kept != tokenizer.eos_id) & (kept != tokenizer.pad_id)][:PASSAGE]
        text = tokenizer.decode(kept.tolist())[:PASSAGE]
        if text.strip():
            before = [place for token, place in places if token <= begin]
            found.append(Passage(text, _said(before[-1] if before else None, source)))
    return found


def _said(place: Place | None, source: Source) -> str:
    if place is None:
        return source.path
    try:
        return place()
    except OSError:  # the line can only be counted where the file is
        return os.fspath(getattr(place, "path", source.path))
