"""Small corpora of random sentences, and what is prepared of them."""

from __future__ import annotations

import base64
import json
import random
from pathlib import Path

WORDS = [
    "the",
    "model",
    "reads",
    "a",
    "token",
    "and",
    "then",
    "another",
    "token",
    "until",
    "the",
    "text",
    "of",
    "the",
    "source",
    "is",
    "at",
    "its",
    "end",
]


MORE = ["user", "assistant", "system", "yes", "no", ".", ".\n", "\n"]
WORDS_VOCABULARY = 512
"""Rows of an embedding for ``words``: those of 100,352 take most of a tiny run's time."""


def words(root: Path) -> Path:
    """A vocabulary that splits these corpora as ``cl100k_base`` does, and any other text somehow."""
    from dbrx_train.data.tokenizer import TiktokenTokenizer, load_tokenizer

    path, cl100k = root / "words.tiktoken", load_tokenizer()
    if path.exists():
        return path
    assert isinstance(cl100k, TiktokenTokenizer)
    met = [f"{space}{word}".encode() for word in {*WORDS, *MORE} for space in ("", " ")]
    pieces = {word[i:j] for word in met for i in range(len(word)) for j in range(i + 1, len(word) + 1)}
    pieces |= {bytes([byte]) for byte in range(256)}
    kept = sorted(pieces & cl100k.ranks.keys(), key=cl100k.ranks.__getitem__)
    path.write_text("".join(f"{base64.b64encode(token).decode()} {i}\n" for i, token in enumerate(kept)))
    return path


def write_corpus(folder: Path, seed: int, documents: int = 60) -> Path:
    """Text files of random sentences, enough for a few dozen samples of 32 tokens."""
    generator = random.Random(seed)
    folder.mkdir(parents=True)
    for i in range(documents):
        words = generator.choices(WORDS, k=generator.randint(20, 90))
        (folder / f"{i:03d}.txt").write_text(" ".join(words) + ".\n")
    return folder


def prepare_sources(
    root: Path, seeds: dict[str, int], seq_len: int, documents: int = 60, vocab_file: Path | None = None
) -> None:
    """Sources of random sentences in ``root``, by name, each from its seed."""
    from dbrx_train.data.prepare.pipeline import prepare

    for name, seed in seeds.items():
        text = write_corpus(root / "text" / name, seed, documents)
        prepare(
            [str(text)],
            str(root / name),
            seq_len=seq_len,
            val_fraction=0.2,
            processes=1,
            progress=False,
            vocab_file=vocab_file and str(vocab_file),
        )


def prepare_pairs(root: Path, vocab_file: Path | None = None) -> Path:
    """``root``/pairs: prepared preferences for one word over another."""
    from dbrx_train.data.prepare.conversations import ChatFormat
    from dbrx_train.data.prepare.pipeline import prepare

    pick = random.Random(0)
    rows = [
        {
            "prompt": " ".join(pick.choices(WORDS[:5], k=15 if i % 3 else 1)),
            "chosen": f"yes {i % 7}",
            "rejected": f"no {i % 5}",
        }
        for i in range(80)
    ]
    path = root / "pairs.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    form = ChatFormat(preferences=True)
    prepare(
        [str(path)],
        str(root / "pairs"),
        seq_len=64,
        val_fraction=0.2,
        processes=1,
        chat=form,
        vocab_file=vocab_file and str(vocab_file),
    )
    return root / "pairs"
