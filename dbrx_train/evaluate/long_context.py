"""Long contexts: questions whose answer lies in the first, middle or last third of a text of a given length.

Two kinds, as LLM Foundry had them and DBRX's launch post reports: the value of a key among many (arXiv
2307.03172), and HotpotQA's questions after its passages (arXiv 1809.09600), made longer by those of others.
"""

from __future__ import annotations

import json
import random
import uuid
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from itertools import accumulate
from pathlib import Path
from typing import Any

import yaml

from dbrx_train.data.tokenizer import Tokenizer
from dbrx_train.files import atomic_write

__all__ = ["POSITIONS", "Passages", "key_value_pairs", "read_hotpot", "write_tasks"]

POSITIONS = ("first", "middle", "last")
_MARGIN = 8  # tokens: pieces of a text are fewer tokens when they are joined, but not always
Row = dict[str, str]
Maker = Callable[[int, str, random.Random], Row]
"""Tokens of context and answer together, position, random numbers -> a row."""


def write_tasks(folder: Path, makers: dict[str, Maker], lengths: Sequence[int], examples: int) -> Path:
    """Write ``tasks.yaml`` and a JSONL file for each kind, position and length, the same each time.

    Raises:
        ValueError: a length is too short, or there are not enough passages to fill one.
    """
    if examples < 1:
        raise ValueError(f"examples: must be at least 1, not {examples}")
    folder.mkdir(parents=True, exist_ok=True)
    entries = []
    for kind, maker in makers.items():
        for length in lengths:
            for position in POSITIONS:
                label = f"{kind}_{position}_{length}"
                rng = random.Random(f"{label} 1")
                rows = [json.dumps(maker(length, position, rng)) + "\n" for _ in range(examples)]
                with atomic_write(folder / f"{label}.jsonl") as partial:
                    partial.write_text("".join(rows), encoding="utf-8")
                entries.append(
                    {
                        "label": label,
                        "dataset_uri": f"{label}.jsonl",
                        "num_fewshot": [0],
                        "icl_task_type": "generation_task_with_answers",
                        "max_seq_len": length,
                        "early_stopping_criteria": ["\n"],
                    }
                )
    with atomic_write(folder / "tasks.yaml") as partial:
        partial.write_text(yaml.safe_dump({"icl_tasks": entries}, sort_keys=False), encoding="utf-8")
    return folder / "tasks.yaml"


def _place(position: str, count: int, rng: random.Random) -> int:
    """Where in the position's third of ``count`` things."""
    third = POSITIONS.index(position)
    begin, end = third * count // 3, (third + 1) * count // 3
    return rng.randrange(begin, max(begin + 1, end))


# --- keys and values ----------------------------------------------------------------------------------------

_KEY_VALUE = (
    "Extract the value corresponding to the specified key in the JSON object below. \n JSON data:\n{data}"
    '\n\nKey: "{key}"\nCorresponding Value: '
)


def key_value_pairs(tokenizer: Tokenizer) -> Maker:
    """As many pairs of UUIDs as fit; the last one is never asked for."""

    def text(pairs: dict[str, str], key: str) -> str:
        return _KEY_VALUE.format(data=json.dumps(pairs), key=key)

    def make(length: int, position: str, rng: random.Random) -> Row:
        def drawn() -> str:
            return str(uuid.UUID(int=rng.getrandbits(128), version=4))

        pairs, used = dict[str, str](), len(tokenizer.encode(text({}, drawn()))) + _MARGIN
        used += 2 * max(len(tokenizer.encode(drawn())) for _ in range(32))  # room for the answer
        while used <= length:
            key, value = drawn(), drawn()
            used += len(tokenizer.encode(f'"{key}": "{value}", '))
            pairs[key] = value
        pairs.popitem() if pairs else None
        if len(pairs) < 4:
            raise ValueError(f"lengths: {length} tokens have no room for four keys; must be more")
        keys = list(pairs)
        key = keys[_place(position, len(keys) - 1, rng)]
        return {"context": text(pairs, key), "answer": pairs[key], "answer_location": position}

    return make


# --- HotpotQA -----------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Passages:
    """HotpotQA's questions with the passages that answer them, and all passages."""

    questions: list[tuple[str, str, list[str]]]
    """Question, answer and titles of the passages that it takes."""
    texts: dict[str, str]
    """By title."""

    def maker(self, tokenizer: Tokenizer) -> Maker:
        """Questions in turn, after passages up to the length; those that it takes lie together."""
        blocks = {title: f"Document: {title}\n{text}\n\n" for title, text in self.texts.items()}
        sizes = dict(zip(blocks, map(len, tokenizer.encode_batch(list(blocks.values()))), strict=True))
        room = max(len(tokenizer.encode(answer)) for _, answer, _ in self.questions)

        def make(length: int, position: str, rng: random.Random) -> Row:
            question, answer, titles = rng.choice(self.questions)
            ask = f"Question: {question}\nAnswer:"
            head = "Answer the question by means of the documents.\n\n"
            used = len(tokenizer.encode(head + ask)) + room + _MARGIN + sum(sizes[title] for title in titles)
            others = rng.sample([title for title in blocks if title not in titles], len(blocks) - len(titles))
            ends = list(accumulate((sizes[title] for title in others), initial=used))
            count = sum(end <= length for end in ends) - 1
            if count < 3:
                raise ValueError(f"lengths: {length} tokens have no room for a question; must be more")
            if count == len(others):
                raise ValueError(
                    f"lengths: all passages together have {ends[-1]} tokens; must be at most that, "
                    f"not {length}"
                )
            at = _place(position, count + 1, rng)
            order = [*others[:at], *titles, *others[at:count]]
            context = head + "".join(blocks[title] for title in order) + ask
            return {"context": context, "answer": answer, "answer_location": position}

        return make


def read_hotpot(path: Path) -> Passages:
    """A file of HotpotQA's JSON: ``question``, ``answer``, ``supporting_facts`` and ``context`` of each.

    Raises:
        ValueError: it is not like that; one line.
    """
    try:
        entries = json.loads(path.read_text(encoding="utf-8"))
        questions, texts = [], dict[str, str]()
        for entry in entries:
            for title, passage in _passages(entry):
                texts.setdefault(title, passage.strip())
            titles = list(dict.fromkeys(str(fact[0]) for fact in entry["supporting_facts"]))
            if all(title in texts for title in titles):
                questions.append((str(entry["question"]), str(entry["answer"]), titles))
    except (ValueError, KeyError, TypeError, IndexError) as error:
        raise ValueError(
            f"{path}: is no file of HotpotQA ({type(error).__name__}: {error}); must be a list of objects "
            f"with question, answer, supporting_facts and context"
        ) from None
    if not questions:
        raise ValueError(f"{path}: has no questions with their passages")
    return Passages(questions, texts)


def _passages(entry: dict[str, Any]) -> Iterator[tuple[str, str]]:
    for title, sentences in entry["context"]:
        yield str(title), sentences if isinstance(sentences, str) else "".join(sentences)
