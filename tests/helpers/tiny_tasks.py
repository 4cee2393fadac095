"""In-context tasks of every type, in the words of the tests' corpora."""

from __future__ import annotations

import json
import random
from pathlib import Path

from corpora import WORDS

TYPES = ("multiple_choice", "schema", "language_modeling", "generation_task_with_answers")


def write_tasks(folder: Path) -> Path:
    """A file of a task for each type, named by it, with 5 rows and a shot each."""
    rng, entries = random.Random(0), ["icl_tasks:"]

    def text(words: int) -> str:
        return " ".join(rng.choices(WORDS, k=words))

    for kind in TYPES:
        rows = []
        for _ in range(5):
            row = {"context": text(5), "continuation": text(2), "answer": text(2), "query": text(6)}
            rows.append(
                row | {"choices": [text(2), text(3)], "context_options": [text(4), text(4)], "gold": 1}
            )
        (folder / f"{kind}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
        entries.append(
            f"- {{label: {kind}, dataset_uri: {kind}.jsonl, num_fewshot: [1], icl_task_type: {kind}}}"
        )
    path = folder / "tasks.yaml"
    path.write_text("\n".join(entries))
    return path
