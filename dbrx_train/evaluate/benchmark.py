"""A benchmark: tasks put to a model as it lies in memory, on one process or on all ranks that hold it."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import TypeVar

import torch.distributed as dist

from dbrx_train.data.tokenizer import Tokenizer
from dbrx_train.evaluate.answers import stopper
from dbrx_train.evaluate.code import completion
from dbrx_train.evaluate.outcomes import Outcome, answered, scored, tested
from dbrx_train.evaluate.prompts import Prompt, Subset, subsets
from dbrx_train.evaluate.sandbox import Sandbox
from dbrx_train.evaluate.scoring import Score, batches, rows_of, score
from dbrx_train.evaluate.tasks import Task
from dbrx_train.evaluate.writing import written
from dbrx_train.model.continuous_batching import Request
from dbrx_train.model.decoder import Dbrx
from dbrx_train.parallel.gather import gather_objects

__all__ = ["Benchmark", "Part"]

_T = TypeVar("_T")
_R = TypeVar("_R")
Key = tuple[str, str | None, int]
"""Task with shots, category and index of an example."""


@dataclass(frozen=True)
class Part:
    """A task with so many shots: what is evaluated and reported as one."""

    task: Task
    shots: int
    subsets: list[Subset]

    @property
    def name(self) -> str:
        return self.task.name(self.shots)


class Benchmark:
    """Tasks with their data, read and checked.

    Args:
        max_seq_len: tokens of the longest prompt with its answer.
        limit: examples of each task, or of each of its categories, from the first on; None: all.
        batch_tokens: of a forward pass at most, padding included.
        as_foundry: score as LLM Foundry does even where it is wrong (docs/evaluation.md says where).
        sandbox: where programs that the model writes are run.

    Raises:
        ValueError: a file is not there, a row is not what its type needs, or programs have nowhere to run.
    """

    def __init__(
        self,
        tasks: Sequence[Task],
        tokenizer: Tokenizer,
        *,
        max_seq_len: int,
        limit: int | None = None,
        batch_tokens: int = 4096,
        as_foundry: bool = False,
        sandbox: Sandbox | None = None,
    ) -> None:
        self.tokenizer, self.limit, self.batch_tokens = tokenizer, limit, batch_tokens
        self.as_foundry, self.sandbox = as_foundry, sandbox
        code = next((task for task in tasks if task.is_code), None)
        if code and sandbox is None:
            raise ValueError(f"{code.label}: runs what the model writes, which `dbrx-train eval` alone does")
        self.parts = [
            Part(task, shots, subsets(task, shots, tokenizer, max_seq_len))
            for task in tasks
            for shots in task.num_fewshot
        ]

    def size(self, part: Part) -> int:
        """Examples of a part that are evaluated."""
        sizes = [subset.size for subset in part.subsets]
        return sum(size if self.limit is None else min(size, self.limit) for size in sizes)

    def cost(self) -> tuple[int, int]:
        """How many examples there are, and how many tokens the model reads for them, or writes at most."""
        examples = tokens = 0
        for task, subset in [(part.task, each) for part in self.parts for each in part.subsets]:
            for prompt in subset.prompts(self.limit):
                examples += 1
                if subset.max_new_tokens:
                    new = subset.max_new_tokens * task.generations_per_sample
                    tokens += len(prompt.pairs[0][0]) + new
                else:
                    tokens += sum(len(row.tokens) for row in rows_of(0, prompt.pairs))
        return examples, tokens

    def run(self, model: Dbrx, part: Part, known: Mapping[Key, Outcome] | None = None) -> Iterator[Outcome]:
        """The outcomes of a part, each once it is there, on one process, or at the end and on every rank.

        ``known``: those that there are from before.

        Raises:
            ValueError: a prompt cannot fit, or the model has fewer words than the tokenizer.
        """
        rows, needed = model.config.vocab_size, self.tokenizer.n_vocab
        if rows < needed:
            raise ValueError(f"model.vocab_size: {rows} words are fewer than the tokenizer's {needed}")
        known = known or {}
        for subset in part.subsets:
            prompts = list(subset.prompts(self.limit))
            keys = {i: (part.name, subset.category, prompt.index) for i, prompt in enumerate(prompts)}
            yield from (known[key] for key in keys.values() if key in known)
            open_ = {i: prompts[i] for i, key in keys.items() if key not in known}
            if subset.max_new_tokens:
                for i, texts in self._write(model, part.task, open_, subset.max_new_tokens):
                    context = self.tokenizer.decode(prompts[i].pairs[0][0])
                    about = (part.name, subset.category, prompts[i], texts, part.task, context)
                    if part.task.is_code:
                        assert self.sandbox is not None
                        yield tested(*about, self.sandbox)
                    else:
                        yield answered(*about, self.as_foundry)
            else:
                for i, scores in self._score(model, open_):
                    yield scored(
                        part.name,
                        subset.category,
                        prompts[i],
                        scores,
                        part.task,
                        self.tokenizer,
                        self.as_foundry,
                    )

    def _score(self, model: Dbrx, prompts: Mapping[int, Prompt]) -> Iterator[tuple[int, list[Score]]]:
        rows = [row for i, prompt in prompts.items() for row in rows_of(i, prompt.pairs)]
        device = model.input_device
        found: dict[int, dict[int, Score]] = {i: {} for i in prompts}
        for scores in _on_ranks(
            batches(rows, self.batch_tokens), lambda batch: list(score(model, batch, device))
        ):
            for (i, number), each in scores:
                found[i][number] = each
                if len(found[i]) == len(prompts[i].pairs):
                    yield i, [found[i][n] for n in range(len(found[i]))]

    def _write(
        self, model: Dbrx, task: Task, prompts: Mapping[int, Prompt], most: int
    ) -> Iterator[tuple[int, list[str]]]:
        """What the model writes after each prompt, as often as the task asks for."""
        stop_ids = [self.tokenizer.eos_id] if self.as_foundry else list(self.tokenizer.stop_ids)
        is_done = self._code_done if task.is_code else stopper(task.early_stopping_criteria, self.tokenizer)
        samples, found = task.generations_per_sample, dict[int, dict[int, str]]()
        requests = [
            (
                i * samples + n,
                Request(
                    prompts[i].pairs[0][0],
                    most,
                    task.temperature,
                    task.top_p,
                    i * samples + n,
                    stop_ids,
                    is_done,
                ),
            )
            for i in sorted(prompts, key=lambda i: -len(prompts[i].pairs[0][0]))  # the longest first
            for n in range(samples)
        ]
        for number, ids in written(model, requests, self.batch_tokens):
            i, n = divmod(number, samples)
            mine = found.setdefault(i, {})
            mine[n] = self.tokenizer.decode(ids[:-1] if ids[-1] in stop_ids else ids)
            if len(mine) == samples:
                yield i, [mine[n] for n in range(samples)]

    def _code_done(self, ids: list[int]) -> bool:
        text = self.tokenizer.decode(ids)
        return len(completion(text)) < len(text)


def _on_ranks(work: Sequence[_T], do: Callable[[_T], list[_R]]) -> Iterator[list[_R]]:
    """What comes of each piece of work; on several ranks, at the end and on all of them.

    Every rank does equally many pieces, since a sharded model is run by all of them together: of those
    left over at the end, some ranks do the last one once more, for nothing.
    """
    if not dist.is_initialized() or dist.get_world_size() == 1:
        yield from map(do, work)
        return
    ranks, mine = dist.get_world_size(), list[_R]()
    for begin in range(0, len(work), ranks):
        number = begin + dist.get_rank()
        done = do(work[min(number, len(work) - 1)])
        mine += done if number < len(work) else []
    yield from gather_objects(mine)
