"""``data explore``: a corpus as one page."""

from __future__ import annotations

import base64
import gzip
import json
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from dbrx_train import pages
from dbrx_train.data.explore.corpus import Source, read_corpus, sources_of
from dbrx_train.data.explore.embedding import Embedding, embed
from dbrx_train.data.explore.filters import term_filters
from dbrx_train.data.explore.signals import SIGNALS, frequent_ngrams, signals
from dbrx_train.data.prepare.text_template import TextTemplate
from dbrx_train.data.tokenizer import load_tokenizer
from dbrx_train.files import atomic_write

__all__ = ["explore"]

_EXAMPLES = 3
"""Typical and odd passages shown of each source."""
_FEWEST_WORDS = 20
"""Of a passage shown as an example."""
_NGRAM_PASSAGES = 5000
_TEXT = 12_000_000
"""Characters of passages that a page holds, about: of many, it shows the beginnings."""


def explore(
    given: Sequence[str],
    out: Path,
    *,
    passages: int,
    clusters: int,
    template: TextTemplate,
    suffixes: Sequence[str],
    vocab_file: str | None = None,
    seed: int = 0,
    advance: Callable[[str], None] = lambda stage: None,
) -> int:
    """Write a page on the sources that ``given`` comes to (``sources_of``); returns its size in bytes.

    Args:
        given: prepared or curated folders, or what ``data prepare`` takes.
        out: the HTML file.
        passages: how many to look at, of all sources.
        clusters: how many to find.
        template: how a row's text is made.
        suffixes: endings of text files.
        vocab_file: the vocabulary that prepared folders were prepared with, and tokens are counted by.
        seed: of clusters and map.
        advance: hears what is being done.

    Raises:
        ValueError: a source cannot be read or holds no text.
    """
    sources = sources_of(given)
    read_corpus(sources, passages, template, suffixes, vocab_file, advance)
    texts = [passage.text for source in sources for passage in source.passages]
    of = np.repeat(np.arange(len(sources)), [len(source.passages) for source in sources])
    advance("signals")
    values = signals(texts, load_tokenizer(vocab_file=vocab_file))
    embedding = embed(texts, clusters, seed, advance)
    advance("page")
    page = _page(sources, texts, of, values, embedding)
    with atomic_write(out) as partial:
        partial.write_text(page, encoding="utf-8")
    return out.stat().st_size


def _page(
    sources: Sequence[Source],
    texts: Sequence[str],
    of: NDArray[np.int64],
    values: NDArray[np.float64],
    embedding: Embedding,
) -> str:
    filters = term_filters(texts, embedding.cluster, embedding.terms)
    counts = np.zeros((len(embedding.centres), len(sources)), int)
    np.add.at(counts, (embedding.cluster, of), 1)
    order = np.argsort(-counts.sum(1), kind="stable")
    shown = min(1000, max(200, _TEXT // len(texts)))
    places = [passage.place for source in sources for passage in source.passages]
    data = {
        "sources": [source.name for source in sources],
        "clusters": embedding.titles,
        "signals": list(SIGNALS),
        "x": _packed(embedding.places[:, 0] * 65535, np.uint16),
        "y": _packed(embedding.places[:, 1] * 65535, np.uint16),
        "source": _packed(of, np.uint16),
        "cluster": _packed(embedding.cluster, np.uint16),
        "values": _packed(values.T, np.float32),
        "texts": _zipped([text[:shown] for text in texts]),
        "places": _zipped(places),
    }
    return pages.render(
        __package__,
        data,
        title=", ".join(source.name for source in sources),
        facts=_facts(sources, len(texts)),
        sources=[_source(i, source, texts, of, values, embedding) for i, source in enumerate(sources)],
        duplicates=_duplicates(sources),
        signals=SIGNALS,
        clusters=[
            {
                "number": int(c),
                "title": embedding.titles[c],
                "passages": int(counts[c].sum()),
                "shares": [
                    (source.name, f"{count / max(1, counts[c].sum()):.0%}")
                    for source, count in zip(sources, counts[c], strict=True)
                    if count
                ],
                "recipe": filters[c].recipe(embedding.titles[c]),
            }
            for c in order.tolist()
            if counts[c].sum()
        ],
    )


def _packed(values: Any, kind: type) -> str:
    """Numbers as base64 of little-endian bytes."""
    raw: bytes = np.ascontiguousarray(values, np.dtype(kind).newbyteorder("<")).tobytes()
    return base64.b64encode(raw).decode()


def _zipped(values: Sequence[str]) -> str:
    """Strings as base64 of zipped JSON."""
    return base64.b64encode(gzip.compress(json.dumps(values).encode(), 6, mtime=0)).decode()


def _facts(sources: Sequence[Source], passages: int) -> list[tuple[str, str]]:
    return [
        ("documents", f"{sum(source.documents for source in sources):,}"),
        ("text", f"{sum(source.text_bytes for source in sources) / 1e6:,.1f} MB"),
        ("passages looked at", f"{passages:,}"),
    ]


def _source(
    number: int,
    source: Source,
    texts: Sequence[str],
    of: NDArray[np.int64],
    values: NDArray[np.float64],
    embedding: Embedding,
) -> dict[str, Any]:
    """What a page says of a source."""
    mine = np.flatnonzero(of == number)
    ratio = float(np.median(values[mine, list(SIGNALS).index("bytes per token")]))
    tokens = f"{source.tokens:,}" if source.tokens is not None else f"about {source.text_bytes / ratio:,.0f}"
    typical, odd = _examples(mine, values, embedding)
    sample = [texts[i] for i in mine[:: -(-len(mine) // _NGRAM_PASSAGES)]]
    most = max(source.lengths)
    unit = "tokens" if source.kind == "prepared" else "characters"
    return {
        "name": source.name,
        "path": source.path,
        "kind": source.kind,
        "documents": f"{source.documents:,}",
        "size": f"{source.text_bytes / 1e6:,.2f} MB",
        "tokens": tokens,
        "ratio": f"{ratio:.2f}",
        "unit": unit,
        "lengths": [
            (f"{1 << power:,}", f"{count:,}", f"{100 * count / most:.1f}")
            for power, count in enumerate(source.lengths)
            if any(source.lengths[: power + 1])
        ],
        "medians": [(name, f"{float(np.median(values[mine, i])):.3g}") for i, name in enumerate(SIGNALS)],
        "typical": [_example(texts, source, i, mine) for i in typical],
        "odd": [_example(texts, source, i, mine) for i in odd],
        "ngrams": [(text, f"{count / len(sample):.1%}") for text, count in frequent_ngrams(sample)],
    }


def _examples(
    mine: NDArray[np.int64], values: NDArray[np.float64], embedding: Embedding
) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
    """The passages nearest to the middle of a source, and those farthest from it and from all clusters."""
    long = mine[values[mine, 0] >= _FEWEST_WORDS]
    long = long if len(long) else mine
    vectors = embedding.vectors[long]
    middle = vectors.mean(0)
    near = vectors @ middle
    apart = near / max(1e-9, float(np.abs(near).max())) + (vectors @ embedding.centres.T).max(1)
    return long[np.argsort(-near)[:_EXAMPLES]], long[np.argsort(apart)[:_EXAMPLES]]


def _example(texts: Sequence[str], source: Source, index: int, mine: NDArray[np.int64]) -> tuple[str, str]:
    return source.passages[index - int(mine[0])].place, texts[index][:400]


def _duplicates(sources: Sequence[Source]) -> list[dict[str, Any]]:
    """Of each source, documents that are one of its own again, and those that each other source has too."""
    keys = [np.asarray(source.keys, np.uint64) for source in sources]
    unique = [np.unique(each) for each in keys]
    return [
        {
            "name": source.name,
            "looked_at": f"{len(mine):,}",
            "within": _share(len(mine) - len(once), len(mine)),
            "others": [
                "" if other is once else _share(int(np.isin(mine, other).sum()), len(mine))
                for other in unique
            ],
        }
        for source, mine, once in zip(sources, keys, unique, strict=True)
    ]


def _share(count: int, total: int) -> str:
    return f"{count:,} ({count / total:.1%})" if total else "none seen whole"
