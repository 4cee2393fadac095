"""Programs and several answers to a question: what counts, and how it is scored."""

from __future__ import annotations

import json
import math
import random
import statistics
from pathlib import Path

import pytest
from foundry import golden_model

from dbrx_train.data.tokenizer import load_tokenizer
from dbrx_train.evaluate import benchmark as benchmarks
from dbrx_train.evaluate.benchmark import Benchmark
from dbrx_train.evaluate.code import Problem, completion, judge, pass_at_k
from dbrx_train.evaluate.outcomes import answered, result
from dbrx_train.evaluate.prompts import Prompt
from dbrx_train.evaluate.sandbox import Sandbox, open_sandbox
from dbrx_train.evaluate.tasks import read_tasks, select

PROBLEM = Problem(
    "def double(n):\n",
    "\ndef check(candidate):\n    for n in range(9):\n        assert candidate(n) == 2 * n\n",
    "double",
)


@pytest.fixture(scope="module")
def sandbox() -> Sandbox:
    """Without walls: what is run here is written here."""
    return open_sandbox(unsafe=True)


@pytest.mark.parametrize(
    ("text", "why"),
    [
        ("    return n + n", "passed"),
        ("    return n + n\n\nprint(double(", "passed"),  # what follows at the margin is no part of it
        ("    return n + n\n```\nThis doubles.", "passed"),
        ("    return n", "AssertionError"),
        ("    return m", "NameError: name 'm' is not defined"),
        ("    return (", "SyntaxError: invalid syntax"),
        ("    import os; os._exit(0)", "ended before its tests"),
        ("    raise SystemExit", "ended before its tests"),
    ],
)
def test_a_program_counts_if_it_comes_through_its_tests(sandbox: Sandbox, text: str, why: str) -> None:
    passed, said = judge(PROBLEM, text, sandbox)
    assert passed == (why == "passed")
    assert said.startswith(why.partition(":")[0])


def test_a_completion_ends_at_the_margin() -> None:
    assert completion("    a\n\n    b\n  # c\n# d") == "    a\n\n    b\n  # c"


def test_pass_at_k_is_the_mean_over_all_choices_of_k() -> None:
    rng = random.Random(0)
    for samples, passed, k in ((5, 2, 1), (5, 2, 3), (5, 0, 2), (5, 5, 2), (20, 3, 10)):
        pool = [1] * passed + [0] * (samples - passed)
        drawn = statistics.mean(max(rng.sample(pool, k)) for _ in range(20_000))
        assert pass_at_k(samples, passed, k) == pytest.approx(drawn, abs=0.015)
    assert pass_at_k(1, 1, 1) == 1.0


TASK = """icl_tasks:
- label: doubles
  dataset_uri: doubles.jsonl
  num_fewshot: [0]
  icl_task_type: code_evaluation
"""


def write(folder: Path, extra: str = "", **fields: object) -> Path:
    row = {"prompt": PROBLEM.prompt, "canonical_solution": "    return n + n", "test": PROBLEM.test}
    (folder / "doubles.jsonl").write_text(json.dumps(row | {"entry_point": "double"} | fields) + "\n")
    (folder / "tasks.yaml").write_text(TASK + extra)
    return folder / "tasks.yaml"


def test_a_model_that_writes_programs_is_scored_by_them(
    tmp_path: Path, sandbox: Sandbox, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Of the real model's programs none passes: the tokens of some are put in the place of its own."""
    tokenizer, model = load_tokenizer(), golden_model()
    options = "  generations_per_sample: 4\n  pass_at_k: 2\n  temperature: 1.0\n"
    tasks = read_tasks(write(tmp_path, options))
    benchmark = Benchmark(tasks, tokenizer, max_seq_len=128, sandbox=sandbox)
    (real,) = benchmark.run(model, benchmark.parts[0])
    assert real.score == 0.0
    assert len(set(real.details["samples"])) > 1, "samples differ"
    assert real.details["prompt"] == PROBLEM.prompt, "white space is kept"

    texts = ["    return n + n\n\ndef", "    return 2 * n", "    return n", "    pass"]
    written = [(n, tokenizer.encode(text)) for n, text in enumerate(texts)]
    monkeypatch.setattr(benchmarks, "written", lambda *_: iter(written))
    (found,) = benchmark.run(model, benchmark.parts[0])
    assert found.score == pytest.approx(1 - 1 / math.comb(4, 2))
    whole = result(tasks[0], [found])
    assert (whole.metric, whole.single) == ("InContextLearningCodeEvalAccuracy", 0.5)


def test_programs_are_not_run_where_there_is_no_sandbox(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"^doubles: runs what the model writes"):
        Benchmark(read_tasks(write(tmp_path)), load_tokenizer(), max_seq_len=128)


@pytest.mark.parametrize(
    ("extra", "fields", "said"),
    [
        ("  generations_per_sample: 4\n", {}, "line 6: generations_per_sample: all would be alike"),
        ("  pass_at_k: 2\n", {}, "line 6: pass_at_k: must be at most generations_per_sample 1, not 2"),
        ("", {"language": "c++"}, "line 1: language is 'c++'; must be python"),
        ("", {"test": None}, "line 1: test must be a text (code_evaluation)"),
    ],
)
def test_mistakes_are_one_line(
    tmp_path: Path, sandbox: Sandbox, extra: str, fields: dict[str, object], said: str
) -> None:
    with pytest.raises(ValueError, match=r"\.(yaml|jsonl), line") as caught:
        Benchmark(
            read_tasks(write(tmp_path, extra, **fields)), load_tokenizer(), max_seq_len=64, sandbox=sandbox
        )
    assert said in str(caught.value)


def test_of_several_answers_the_commonest_counts() -> None:
    (task,) = select(["gsm8k_maj_at_8"], None)
    prompt = Prompt(0, [([1], [])], 0, ["18"])
    texts = [
        "so.\nThe answer is 18.0",
        "so.\nThe answer is 7",
        "so.\nThe answer is $18",
        "x\nThe answer is 7",
        "18",
    ]
    found = answered("x", None, prompt, [*texts[:3], "hm"], task, "?", False)
    assert (found.score, found.single) == (1.0, 0.5)
    assert found.details["answer"] == "18.0"
    assert answered("x", None, prompt, texts[1:4], task, "?", False).score == 0.0
    assert answered("x", None, prompt, [texts[2]], task, "?", False).single is None
