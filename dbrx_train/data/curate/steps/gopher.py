"""Gopher's rules of quality and repetition (Rae et al. 2021, arXiv 2112.11446, section A.1.1, table A1)."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from dbrx_train.data.curate.batch import Batch, Tokens
from dbrx_train.data.curate.repetition import duplicate_ngrams, repeated_shares
from dbrx_train.data.curate.step import Rule, Step, between
from dbrx_train.options import option

__all__ = ["GopherQuality", "GopherRepetition"]

_STOP_WORDS = {"the", "be", "to", "of", "and", "that", "have", "with"}
_BULLETS = ("•", "-", "*", "‣", "◦", "▪", "·")
_ELLIPSES = ("...", "…")


@dataclass
class GopherQuality(Step):
    """Keep what looks like prose."""

    name = "gopher_quality"
    min_words: int = option("Words of a document, at least.", 50, ge=0)
    max_words: int = option("Words of a document, at most.", 100_000, gt=0)
    min_mean_word_length: float = option("Characters of a word on average, at least.", 3.0, ge=0)
    max_mean_word_length: float = option("Characters of a word on average, at most.", 10.0, gt=0)
    max_symbols_per_word: float = option("Hash signs, or ellipses, for each word, at most.", 0.1, ge=0)
    max_bullet_lines: float = option("Share of lines that begin with a bullet, at most.", 0.9, ge=0, le=1)
    max_ellipsis_lines: float = option("Share of lines that end in an ellipsis, at most.", 0.3, ge=0, le=1)
    min_alphabetic_words: float = option("Share of words with a letter, at least.", 0.8, ge=0, le=1)
    min_stop_words: int = option("How many of eight common English words it has, at least.", 2, ge=0, le=8)

    def annotate(self, batch: Batch, work: Path) -> Batch:
        words = batch.words
        count = np.maximum(words.counts, 1)
        lines = [(_share(lines, _starts), _share(lines, _ends)) for lines in batch.lines]
        bullets, ellipses = np.array(lines, np.float32).reshape(-1, 2).T
        symbols = [max(text.count("#"), sum(text.count(e) for e in _ELLIPSES)) for text in batch.texts]
        alphabetic = words.sums(words.each(_has_letter, np.bool_))
        return batch.with_columns(
            {
                "gopher_quality.words": words.counts,
                "gopher_quality.mean_word_length": (words.sums(words.lengths) / count).astype(np.float32),
                "gopher_quality.symbols_per_word": (np.array(symbols) / count).astype(np.float32),
                "gopher_quality.bullet_lines": bullets,
                "gopher_quality.ellipsis_lines": ellipses,
                "gopher_quality.alphabetic_words": (alphabetic / count).astype(np.float32),
                "gopher_quality.stop_words": _stop_words(words),
            }
        )

    def rules(self) -> list[Rule]:
        own = "gopher_quality"
        return [
            between(f"{own}.words", self.min_words, self.max_words),
            between(f"{own}.mean_word_length", self.min_mean_word_length, self.max_mean_word_length),
            between(f"{own}.symbols_per_word", high=self.max_symbols_per_word),
            between(f"{own}.bullet_lines", high=self.max_bullet_lines),
            between(f"{own}.ellipsis_lines", high=self.max_ellipsis_lines),
            between(f"{own}.alphabetic_words", low=self.min_alphabetic_words),
            between(f"{own}.stop_words", low=self.min_stop_words),
        ]


def _has_letter(word: str) -> bool:
    return word[0].isalpha() or any(map(str.isalpha, word))


def _starts(line: str) -> bool:
    return line.startswith(_BULLETS)


def _ends(line: str) -> bool:
    return line.endswith(_ELLIPSES)


def _share(lines: list[str], fits: Any) -> float:
    return sum(map(fits, lines)) / len(lines) if lines else 0.0


def _stop_words(words: Tokens) -> NDArray[np.int64]:
    """How many different ones each text has; [texts]."""
    numbers = {word: number for number, word in enumerate(sorted(_STOP_WORDS))}
    which = words.each(lambda word: numbers.get(word.lower().strip(".,;:!?\"'()"), -1), np.int64)
    at = np.flatnonzero(which >= 0)
    has = np.zeros((len(words.counts), len(numbers)), np.bool_)
    has[words.owners[at], which[at]] = True
    return np.asarray(has.sum(axis=1))


@dataclass
class GopherRepetition(Step):
    """Remove what repeats itself: lines, paragraphs, and runs of words."""

    name = "gopher_repetition"
    max_duplicate_lines: float = option("Share of lines that occurred before.", 0.30, ge=0, le=1)
    max_duplicate_line_characters: float = option("Share of characters in these.", 0.20, ge=0, le=1)
    max_duplicate_paragraphs: float = option("Share of paragraphs that occurred before.", 0.30, ge=0, le=1)
    max_duplicate_paragraph_characters: float = option("Share of characters in these.", 0.20, ge=0, le=1)
    max_top_ngrams: list[float] = option(
        "Share of characters in the most common run of 2, 3 and 4 words.", lambda: [0.20, 0.18, 0.16]
    )
    max_duplicate_ngrams: list[float] = option(
        "Share of characters in runs of 5 to 10 words that occurred before.",
        lambda: [0.15, 0.14, 0.13, 0.12, 0.11, 0.10],
    )

    def check(self) -> None:
        for key, values, count in (
            ("max_top_ngrams", self.max_top_ngrams, 3),
            ("max_duplicate_ngrams", self.max_duplicate_ngrams, 6),
        ):
            if len(values) != count or not all(0 <= value <= 1 for value in values):
                raise ValueError(f"{key}: must be {count} shares between 0 and 1, not {values}")

    def annotate(self, batch: Batch, work: Path) -> Batch:
        lines = np.array([repeated_shares(lines) for lines in batch.lines], np.float32)
        texts = [text.strip().split("\n\n") for text in batch.texts]
        paragraphs = np.array(
            [repeated_shares([p for p in map(str.strip, parts) if p]) for parts in texts], np.float32
        )
        own = "gopher_repetition"
        columns = {
            f"{own}.duplicate_lines": lines[:, 0],
            f"{own}.duplicate_line_characters": lines[:, 1],
            f"{own}.duplicate_paragraphs": paragraphs[:, 0],
            f"{own}.duplicate_paragraph_characters": paragraphs[:, 1],
        }
        for name, shares in duplicate_ngrams(batch.words).items():
            columns[f"{own}.{name}"] = shares
        return batch.with_columns(columns)

    def rules(self) -> list[Rule]:
        own = "gopher_repetition"
        return [
            between(f"{own}.duplicate_lines", high=self.max_duplicate_lines),
            between(f"{own}.duplicate_line_characters", high=self.max_duplicate_line_characters),
            between(f"{own}.duplicate_paragraphs", high=self.max_duplicate_paragraphs),
            between(f"{own}.duplicate_paragraph_characters", high=self.max_duplicate_paragraph_characters),
            *(between(f"{own}.top_{n}gram", high=most) for n, most in enumerate(self.max_top_ngrams, 2)),
            *(
                between(f"{own}.duplicate_{n}grams", high=most)
                for n, most in enumerate(self.max_duplicate_ngrams, 5)
            ),
        ]
