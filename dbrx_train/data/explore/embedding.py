"""Where passages lie to each other: TF-IDF and SVD, clusters with titles, and a map.

The vectors are those of latent semantic analysis (Deerwester et al., 1990). t-SNE lays out some thousand
landmarks; every other passage is put amid its nearest ones, which takes seconds where t-SNE of all would take
minutes.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

__all__ = ["Embedding", "Floats", "embed"]

Floats = NDArray[np.float32]
Ints = NDArray[np.int64]
_DIMENSIONS = 64
_LANDMARKS = 3000
_NEIGHBOURS = 8
_BATCH = 4096
_TITLE = 4
"""Terms of a cluster's title."""
_TERMS = 24
_PATTERN = r"(?u)\b[^\W\d]\w{2,}\b"


@dataclass(frozen=True)
class Embedding:
    """Vectors, clusters and places on a map."""

    vectors: Floats
    """[passages, dimensions], of length 1, or 0 where a passage has no word that others have."""
    cluster: Ints
    """[passages]"""
    centres: Floats
    """[clusters, dimensions]"""
    terms: list[list[str]]
    """Of each cluster, those that set it apart, the most telling first (class-based TF-IDF)."""
    places: Floats
    """[passages, 2], in [0, 1]."""

    @property
    def titles(self) -> list[str]:
        return [", ".join(terms[:_TITLE]) or "no words" for terms in self.terms]


def embed(texts: Sequence[str], clusters: int, seed: int, advance: Callable[[str], None]) -> Embedding:
    """The embedding of passages, the same for the same texts and seed on one machine.

    Raises:
        ModuleNotFoundError: the extra ``explore`` is not installed.
        ValueError: the passages have no words in common.
    """
    from sklearn.cluster import MiniBatchKMeans
    from sklearn.decomposition import TruncatedSVD
    from sklearn.feature_extraction.text import TfidfVectorizer
    from sklearn.preprocessing import normalize

    advance("words")
    vectorizer = TfidfVectorizer(
        token_pattern=_PATTERN,
        sublinear_tf=True,
        min_df=min(3, 1 + len(texts) // 50),
        max_df=0.5 if len(texts) > 20 else 1.0,
        max_features=50_000,
        dtype=np.float32,
    )
    try:
        words = vectorizer.fit_transform(texts)
    except ValueError as error:
        raise ValueError("the passages have too few words in common to be laid out") from error
    advance("vectors")
    dimensions = min(_DIMENSIONS, words.shape[1] - 1, len(texts) - 1)
    if dimensions < 2:
        raise ValueError("the passages have too few words in common to be laid out")
    vectors = normalize(TruncatedSVD(dimensions, random_state=seed).fit_transform(words)).astype(np.float32)
    advance("clusters")
    count = min(clusters, len(texts))
    means = MiniBatchKMeans(count, random_state=seed, batch_size=_BATCH, n_init=3).fit(vectors)
    cluster = means.labels_.astype(np.int64)
    terms = _terms(words, cluster, count, vectorizer.get_feature_names_out())
    advance("map")
    centres = means.cluster_centers_.astype(np.float32)
    return Embedding(vectors, cluster, centres, terms, _map(vectors, seed))


def _terms(words: Any, cluster: Ints, count: int, names: NDArray[Any]) -> list[list[str]]:
    """Class-based TF-IDF (Grootendorst, arXiv 2203.05794) over passages that hold a word."""
    holds = words.sign()
    per_cluster = np.stack([np.asarray(holds[cluster == c].sum(0)).ravel() for c in range(count)])
    share = per_cluster / np.maximum(1, np.bincount(cluster, minlength=count))[:, None]
    mean = share.mean(0, keepdims=True)
    score = share * np.log1p(share / np.maximum(mean, 1e-9))
    best = np.argsort(-score, axis=1)[:, :_TERMS]
    return [[str(names[i]) for i in row if score[c, i] > 0] for c, row in enumerate(best)]


def _map(vectors: Floats, seed: int) -> Floats:
    from sklearn.manifold import TSNE

    generator = np.random.default_rng(seed)
    chosen = np.sort(generator.permutation(len(vectors))[:_LANDMARKS])
    landmarks = vectors[chosen]
    perplexity = min(30.0, max(1.0, (len(chosen) - 1) / 4))
    layout = TSNE(
        2, perplexity=perplexity, init="pca", random_state=seed, metric="cosine", max_iter=500
    ).fit_transform(landmarks + 1e-6)
    places = np.empty((len(vectors), 2), np.float32)
    count = min(_NEIGHBOURS, len(chosen))
    for begin in range(0, len(vectors), _BATCH):
        near = vectors[begin : begin + _BATCH] @ landmarks.T
        index = np.argpartition(-near, count - 1, axis=1)[:, :count]
        weight = np.maximum(np.take_along_axis(near, index, 1), 1e-3) ** 8
        places[begin : begin + _BATCH] = (layout[index] * weight[..., None]).sum(1) / weight.sum(1)[:, None]
    places[chosen] = layout
    low, high = places.min(0), places.max(0)
    scaled: Floats = (places - low) / np.maximum(high - low, 1e-9)
    return scaled
