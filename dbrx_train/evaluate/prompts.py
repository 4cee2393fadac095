"""Prompts: what the model reads of each row of a task's data, token for token as LLM Foundry 0.22 has it.

Shots are drawn from the rows themselves; shots, context and answer are tokenised apart.
"""

from __future__ import annotations

import json
import random
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from itertools import islice
from pathlib import Path
from typing import Any

from dbrx_train.data.tokenizer import Tokenizer
from dbrx_train.evaluate.code import Problem
from dbrx_train.evaluate.tasks import Task

__all__ = ["Prompt", "Subset", "subsets"]

_MORE = 10  # LLM Foundry leaves so many tokens more to programs, and to answers with a chain of thought
_KEYS = {
    "multiple_choice": ("query", "", "choices"),
    "schema": ("", "continuation", "context_options"),
    "language_modeling": ("context", "continuation", ""),
    "generation_task_with_answers": ("context", "answer", ""),
    "code_evaluation": ("prompt", "canonical_solution", ""),
}
"""Task type -> the fields of context, answer and choices."""
Row = dict[str, Any]


@dataclass(frozen=True)
class Prompt:
    """A row as the model is asked."""

    index: int
    """Of the row among those of its category, or of the file."""
    pairs: list[tuple[list[int], list[int]]]
    """Token ids of a context, never empty, and of what is scored after it: one pair for each choice, or the
    only one; to generate is what follows an empty second part."""
    gold: int = 0
    """The right pair."""
    answers: list[str] = field(default_factory=list)
    """Texts that a generated answer may begin with."""
    truncated: bool = False
    """Whether the context lost its beginning."""
    problem: Problem | None = None
    """What a generated program is tested by."""


@dataclass(frozen=True)
class Subset:
    """The rows of a task that are scored together: a category's, or all."""

    category: str | None
    size: int
    max_new_tokens: int
    """Room for a generated answer; 0 where none is generated."""
    prompts: Callable[[int | None], Iterator[Prompt]]
    """The first so many prompts, or all."""


def subsets(task: Task, shots: int, tokenizer: Tokenizer, max_seq_len: int) -> list[Subset]:
    """The prompts of a task, by category in the order of their names.

    Raises:
        ValueError: the data is not there, or a row lacks what its type needs; one line with file and line.
    """
    rows = _read(Path(task.dataset_uri), task)
    parts: dict[str | None, list[Row]] = {None: rows}
    if task.has_categories:
        parts = {
            name: [r for r in rows if r["category"] == name] for name in sorted({r["category"] for r in rows})
        }
    limit = task.max_seq_len or max_seq_len
    return [
        _subset(name, part, task, shots, tokenizer, min(limit, max_seq_len)) for name, part in parts.items()
    ]


def _subset(
    name: str | None, rows: list[Row], task: Task, shots: int, tokenizer: Tokenizer, max_seq_len: int
) -> Subset:
    room = 0
    if task.is_written:
        room = _room(rows, task, tokenizer)
        if room >= max_seq_len:
            raise ValueError(
                f"{task.dataset_uri}: its longest answer takes {room} tokens, which leaves no room for a "
                f"prompt in {max_seq_len} (max_seq_len)"
            )
    writer = _Writer(task, tokenizer, max_seq_len, room, rows)
    writer.check()
    return Subset(name, len(rows), room, lambda limit: islice(writer.prompts(shots), limit))


def _read(path: Path, task: Task) -> list[Row]:
    try:
        lines = path.read_text(encoding="utf-8").split("\n")
    except FileNotFoundError:
        raise ValueError(f"{path}: no such file (dataset_uri of {task.label})") from None
    except UnicodeDecodeError:
        raise ValueError(f"{path}: no text in UTF-8") from None
    rows = []
    for number, line in enumerate(lines, 1):
        if not line.strip():
            continue
        where = f"{path}, line {number}"
        try:
            row = json.loads(line)
        except ValueError as error:
            raise ValueError(f"{where}: not valid JSON: {error}") from None
        if not isinstance(row, dict):
            raise ValueError(f"{where}: must be an object with the fields of {task.icl_task_type}")
        rows.append(_checked(row, task, where))
    if not rows:
        raise ValueError(f"{path}: has no rows")
    return rows


def _checked(row: Row, task: Task, where: str) -> Row:
    """The fields that count, under their usual names, and where they are from."""

    def take(key: str, kind: type, default: Any = None) -> Any:
        value = row.get(key, default)
        many = [value] if kind is not list else value
        item = str if kind is list else kind
        if (
            not isinstance(value, kind)
            or isinstance(value, bool)
            or not all(isinstance(v, item) for v in many)
        ):
            word = {str: "a text", int: "a whole number", list: "a list of texts"}[kind]
            lacks = f"lacks {key}," if key not in row else f"{key} must be"
            raise ValueError(f"{where}: {lacks} {word} ({task.icl_task_type})")
        return value

    usual = _KEYS[task.icl_task_type]
    given = (task.context_key, task.answer_key, task.choices_key)
    context, answer, choices = (mine or theirs for mine, theirs in zip(given, usual, strict=True))
    found: Row = {"where": where}
    if usual[0]:
        found["context"] = take(context, str)
    if usual[1]:
        found["answer"] = take(answer, str)
    if usual[2]:
        found["choices"], found["gold"] = take(choices, list), take("gold", int)
        if not 0 <= found["gold"] < len(found["choices"]):
            raise ValueError(
                f"{where}: gold is {found['gold']}, no index of its {len(found['choices'])} {choices}"
            )
    if task.icl_task_type == "generation_task_with_answers":
        found["aliases"] = list(dict.fromkeys([found["answer"], *take("aliases", list, [])]))
        found["chain_of_thought"] = take("chain_of_thought", str, "")
        found["has_cot"] = "chain_of_thought" in row
    if task.is_code:
        found["aliases"], found["chain_of_thought"], found["has_cot"] = [found["answer"]], "", False
        found["problem"] = Problem(found["context"], take("test", str), take("entry_point", str))
        if (language := row.get("language", "python")) != "python":
            raise ValueError(f"{where}: language is {language!r}; must be python, which alone is run")
    if task.has_categories:
        found["category"] = take("category", str)
    return found


def _room(rows: list[Row], task: Task, tokenizer: Tokenizer) -> int:
    """Tokens of the longest answer, as it stands in the file, with its chain of thought."""
    thought = any(row["has_cot"] for row in rows)
    texts = [
        f"{row['chain_of_thought']}{task.cot_delimiter}{answer}" if thought else answer
        for row in rows
        for answer in row["aliases"]
    ]
    longest = max(map(len, tokenizer.encode_batch(texts)))
    return max(1, longest + (_MORE if task.cot_delimiter or task.is_code else 0))


def _sample(size: int, shots: int, index: int, rng: random.Random) -> set[int]:
    """Rows to be shots of row ``index``; the set's own order is that of the shots."""
    shots = min(size - 1, shots)
    chosen = set(rng.sample(range(size), shots))
    if index in chosen:
        chosen.remove(index)
        if len(chosen) >= size - 1:
            return chosen
        other = rng.choice(range(size))
        while other in chosen or other == index:
            other = rng.choice(range(size))
        chosen.add(other)
    return chosen


class _Writer:
    """Writes the prompts of rows."""

    def __init__(
        self, task: Task, tokenizer: Tokenizer, max_seq_len: int, room: int, rows: Sequence[Row]
    ) -> None:
        self.task, self.tokenizer = task, tokenizer
        self.max_seq_len, self.room = max_seq_len, room
        self.rows = [self._stripped(row) for row in rows] if task.strip_dataset else rows
        self.thought = any(row.get("has_cot") for row in rows)
        # Where a space belongs to the word after it, a continuation begins with one.
        self.space = " " if len(tokenizer.encode(" a")) == 1 else ""

    @staticmethod
    def _stripped(row: Row) -> Row:
        return {key: value.strip() if isinstance(value, str) else value for key, value in row.items()}

    def check(self) -> None:
        """Raise ValueError for a text that cannot be scored, before any is."""
        for row in [] if self.room else self.rows:
            for text in self._texts(row):
                self._scored(text, row["where"])

    def _texts(self, row: Row) -> list[str]:
        """What is scored after its contexts."""
        several: list[str] = (
            row["choices"] if self.task.icl_task_type == "multiple_choice" else [row["answer"]]
        )
        return several

    def prompts(self, shots: int) -> Iterator[Prompt]:
        rng = random.Random(self.task.fewshot_random_seed)
        for index, row in enumerate(self.rows):
            text = self.task.prompt_string
            if shots > 0:
                for shot in _sample(len(self.rows), shots, index, rng):
                    text += self._shot(self.rows[shot], preceded=bool(text))
            yield self._prompt(index, row, text)

    def _context(self, context: str, preceded: bool) -> str:
        delimiter = self.task.example_delimiter if preceded else ""
        return f"{delimiter}{self.task.prelimiter}{context}{self.task.continuation_delimiter}"

    def _shot(self, row: Row, preceded: bool) -> str:
        if self.task.icl_task_type == "schema":  # here alone the prelimiter comes ahead of the delimiter
            delimiter = self.task.example_delimiter if preceded else ""
            option = row["choices"][row["gold"]]
            cut = self.task.continuation_delimiter
            return f"{self.task.prelimiter}{delimiter}{option}{cut}{row['answer']}"
        if self.task.icl_task_type == "multiple_choice":
            answer = row["choices"][row["gold"]]
        elif self.thought:
            answer = f"{row['chain_of_thought']}{self.task.cot_delimiter}{row['answer']}"
        else:
            answer = row["answer"]
        return f"{self._context(row['context'], preceded)}{answer}"

    def _prompt(self, index: int, row: Row, before: str) -> Prompt:
        begin = self.tokenizer.encode(before)
        if self.task.icl_task_type == "schema":
            contexts = self._options(row, bool(before))
        else:
            context = self._context(row["context"], bool(before))
            contexts = [context.rstrip() if self.task.strip_dataset else context]
        # Nothing predicts the first token of all: an empty context becomes the end of some other text.
        heads = [begin + self.tokenizer.encode(context) or [self.tokenizer.eos_id] for context in contexts]
        if self.room:
            head = heads[0][-(self.max_seq_len - self.room) :]
            cut = len(head) < len(heads[0])
            return Prompt(index, [(head, [])], 0, row["aliases"], cut, row.get("problem"))
        tails = [self._scored(text, row["where"]) for text in self._texts(row)]
        # Either several contexts with one continuation, or one with several.
        pairs = [(head, tail) for head in heads for tail in tails]
        fitting = [
            (head[len(tail) - self.max_seq_len :] if self._long(head, tail) else head, tail)
            for head, tail in pairs
        ]
        cut = any(self._long(head, tail) for head, tail in pairs)
        return Prompt(index, fitting, row.get("gold", 0), truncated=cut)

    def _options(self, row: Row, preceded: bool) -> list[str]:
        if not preceded:
            return [f"{self.task.prelimiter}{option}" for option in row["choices"]]
        cut = self.task.continuation_delimiter
        cut = cut.rstrip() if self.task.strip_dataset else cut
        return [f"{self.task.prelimiter}{self.task.example_delimiter}{o}{cut}" for o in row["choices"]]

    def _scored(self, text: str, where: str) -> list[int]:
        ids = self.tokenizer.encode(text if text.startswith(" ") else self.space + text)
        if not text.strip():
            raise ValueError(f"{where}: has an empty text to score")
        if len(ids) >= self.max_seq_len:
            raise ValueError(
                f"{where}: has {len(ids)} tokens to score, which leaves no room for a context in "
                f"{self.max_seq_len} (max_seq_len)"
            )
        return ids

    def _long(self, head: list[int], tail: list[int]) -> bool:
        return len(head) + len(tail) > self.max_seq_len
