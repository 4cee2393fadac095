"""Equal scores: token ids and outcomes as LLM Foundry 0.22 recorded them (scripts/foundry_golden.py)."""

from __future__ import annotations

import hashlib
import json
import os
from pathlib import Path
from typing import Any

import pytest
from foundry import FOUNDRY, golden_model

from dbrx_train.data.tokenizer import load_tokenizer
from dbrx_train.evaluate.answers import normalize
from dbrx_train.evaluate.benchmark import Benchmark
from dbrx_train.evaluate.outcomes import Outcome
from dbrx_train.evaluate.prompts import Prompt, Subset
from dbrx_train.evaluate.tasks import Task, read_tasks

MAX_SEQ_LEN = 384  # of the records
EXAMPLES = 300  # of a task, in the hash of its token ids
GAUNTLET = os.environ.get("GAUNTLET_DATA")
"""LLM Foundry's scripts/eval/local_data, where it is at hand."""


def record(name: str) -> dict[str, Any]:
    found: dict[str, Any] = json.loads((FOUNDRY / name).read_text())
    return found


def benchmark(tasks: list[Task], max_seq_len: int = MAX_SEQ_LEN) -> Benchmark:
    return Benchmark(tasks, load_tokenizer(), max_seq_len=max_seq_len, as_foundry=True, batch_tokens=2048)


def hash_of(subset: Subset) -> str:
    digest = hashlib.sha256()
    for prompt in subset.prompts(EXAMPLES):
        digest.update(json.dumps(ids_of(prompt, subset.max_new_tokens)).encode())
    return digest.hexdigest()


def ids_of(prompt: Prompt, room: int) -> Any:
    return [prompt.pairs[0][0], room] if room else [list(pair) for pair in prompt.pairs]


def hashes(made: Benchmark) -> dict[str, Any]:
    return {
        "/".join(filter(None, (part.name, subset.category))): {
            "examples": subset.size,
            "sha256": hash_of(subset),
        }
        for part in made.parts
        for subset in part.subsets
    }


def test_token_ids_are_foundrys() -> None:
    assert hashes(benchmark(read_tasks(FOUNDRY / "tasks.yaml"))) == record("tokens.json")


@pytest.mark.slow
@pytest.mark.skipif(not GAUNTLET, reason="GAUNTLET_DATA does not say where the Gauntlet's data sets are")
def test_token_ids_of_whole_data_sets_are_foundrys() -> None:
    tasks = read_tasks(FOUNDRY / "whole_tasks.yaml", Path(str(GAUNTLET)))
    assert hashes(benchmark(tasks, 2048)) == record("whole_tokens.json")


def is_close(outcome: Outcome) -> bool:
    """Whether rounding may turn it: two choices within 1e-4 of each other."""
    means = sorted(outcome.details.get("mean_log_probs", [0.0, 1.0]))
    return means[-1] - means[-2] < 1e-4


def said(outcome: Outcome, task: Task) -> Any:
    """The choice, the tokens predicted or the answer written, as the records have it."""
    details = outcome.details
    if task.is_choice:
        return details["mean_log_probs"].index(max(details["mean_log_probs"]))
    if "answer" in details:
        return (normalize if task.do_normalization else str.strip)(details["answer"])
    return details["predicted_ids"]


@pytest.mark.slow
def test_outcomes_are_foundrys() -> None:
    model, wanted = golden_model(), record("outcomes.json")
    made, right = benchmark(read_tasks(FOUNDRY / "tasks.yaml")), dict[str, int]()
    for part in made.parts:
        for outcome in made.run(model, part):
            where = "/".join(filter(None, (part.name, outcome.category)))
            score, detail = wanted[where][outcome.index]
            assert (outcome.score, said(outcome, part.task)) == (score, detail) or is_close(outcome), where
            right[part.task.icl_task_type] = right.get(part.task.icl_task_type, 0) + int(score)
    assert len(right) == 4
    assert all(right.values()), f"of each type some examples are right: {right}"
