"""Small corpora of random sentences, and what is prepared of them."""

from __future__ import annotations

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


def write_corpus(folder: Path, seed: int, documents: int = 60) -> Path:
    """Text files of random sentences, enough for a few dozen samples of 32 tokens."""
    generator = random.Random(seed)
    folder.mkdir(parents=True)
    for i in range(documents):
        words = generator.choices(WORDS, k=generator.randint(20, 90))
        (folder / f"{i:03d}.txt").write_text(" ".join(words) + ".\n")
    return folder


def prepare_sources(root: Path, seeds: dict[str, int], seq_len: int, documents: int = 60) -> None:
    """Sources of random sentences in ``root``, by name, each from its seed."""
    from dbrx_train.data.prepare.pipeline import prepare

    for name, seed in seeds.items():
        text = write_corpus(root / "text" / name, seed, documents)
        prepare([str(text)], str(root / name), seq_len=seq_len, val_fraction=0.2, processes=1, progress=False)


def prepare_pairs(root: Path) -> Path:
    """``root``/pairs: prepared preferences for one word over another."""
    from dbrx_train.data.prepare.conversations import ChatFormat
    from dbrx_train.data.prepare.pipeline import prepare

    pick = random.Random(0)
    words = ["the", "model", "reads", "a", "token"]
    rows = [
        {
            "prompt": " ".join(pick.choices(words, k=15 if i % 3 else 1)),
            "chosen": f"yes {i % 7}",
            "rejected": f"no {i % 5}",
        }
        for i in range(80)
    ]
    path = root / "pairs.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    form = ChatFormat(preferences=True)
    prepare([str(path)], str(root / "pairs"), seq_len=64, val_fraction=0.2, processes=1, chat=form)
    return root / "pairs"
