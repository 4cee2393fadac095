"""Tasks and their data: what is wrong is one line with file and line number."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from dbrx_train.data.tokenizer import load_tokenizer
from dbrx_train.evaluate.benchmark import Benchmark
from dbrx_train.evaluate.gauntlet import read_gauntlet
from dbrx_train.evaluate.tasks import GAUNTLET, TASKS, read_tasks, select

CHOICE = {"query": "Two and two are", "choices": ["four", "five"], "gold": 0}
ANSWER = {"context": "Two and two?", "answer": "four"}
TASK = "label: sums\n  dataset_uri: sums.jsonl\n  num_fewshot: [0]\n  icl_task_type: multiple_choice\n"


def write(folder: Path, task: str, *rows: object) -> Path:
    path = folder / "tasks.yaml"
    path.write_text(f"icl_tasks:\n- {task}")
    lines = (row if isinstance(row, str) else json.dumps(row) for row in rows)
    (folder / "sums.jsonl").write_text("".join(f"{line}\n" for line in lines))
    return path


@pytest.mark.parametrize(
    ("task", "said"),
    [
        (TASK + "  shots: 3\n", "line 6: unknown key shots"),
        (TASK + "  cot_delimeter: x\n", "line 6: unknown key cot_delimeter; did you mean cot_delimiter?"),
        (
            TASK.replace("multiple_choice", "multiple_choise"),
            "line 5: icl_task_type: 'multiple_choise' is not",
        ),
        (TASK.replace("[0]", "[-1]"), "line 4: num_fewshot: must not be negative, not -1"),
        (TASK.replace("[0]", "[few]"), "line 4: num_fewshot must be list[int], not ['few']"),
        (TASK.replace("  num_fewshot: [0]\n", ""), "line 2: lacks num_fewshot"),
        (TASK + "  metric_names: [BLEU]\n", "line 6: metric_names: 'BLEU' is not known for multiple_choice"),
        (TASK + "  prelimiter: a\n  question_prelimiter: a\n", "line 6: prelimiter and question_prelimiter"),
        (TASK + f"- {TASK}", "line 6: sums/0-shot is there already"),
        ("[", "not valid YAML"),
        ("just a text\n", "line 2: a task is a mapping of keys"),
    ],
)
def test_a_task_that_is_wrong_is_named_with_its_line(tmp_path: Path, task: str, said: str) -> None:
    with pytest.raises(ValueError, match=r"tasks\.yaml") as caught:
        read_tasks(write(tmp_path, task))
    assert said in str(caught.value)
    assert "\n" not in str(caught.value)


GENERATION = TASK.replace("multiple_choice", "generation_task_with_answers")


@pytest.mark.parametrize(
    ("task", "row", "said"),
    [
        (TASK, {"query": "?", "choices": ["a"]}, "line 2: lacks gold, a whole number (multiple_choice)"),
        (TASK, {**CHOICE, "gold": 2}, "line 2: gold is 2, no index of its 2 choices"),
        (TASK, {**CHOICE, "choices": ["a", 1]}, "line 2: choices must be a list of texts"),
        (TASK, {**CHOICE, "choices": ["four", " "]}, "line 2: has an empty text to score"),
        (
            TASK,
            {**CHOICE, "choices": ["a " * 99, "b"]},
            "line 2: has 100 tokens to score, which leaves no room",
        ),
        (TASK, "{", "line 2: not valid JSON"),
        (TASK, [1], "line 2: must be an object"),
        (TASK + "  has_categories: true\n", CHOICE, "line 1: lacks category, a text"),
        (TASK.replace("multiple_choice", "schema"), CHOICE, "line 1: lacks continuation, a text (schema)"),
        (GENERATION, ANSWER, "line 1: lacks context, a text (generation_task_with_answers)"),
    ],
)
def test_a_row_that_is_wrong_is_named_with_its_line(
    tmp_path: Path, task: str, row: object, said: str
) -> None:
    tasks = read_tasks(write(tmp_path, task, CHOICE, row))
    with pytest.raises(ValueError, match=r"sums\.jsonl") as caught:
        Benchmark(tasks, load_tokenizer(), max_seq_len=64)
    assert said in str(caught.value)


def test_an_answer_that_leaves_no_room_is_refused(tmp_path: Path) -> None:
    tasks = read_tasks(write(tmp_path, GENERATION, {**ANSWER, "answer": "four " * 80}))
    with pytest.raises(ValueError, match=r"longest answer takes 8\d tokens, which leaves no room"):
        Benchmark(tasks, load_tokenizer(), max_seq_len=64)


def test_shots_are_as_many_as_there_are_and_never_the_row_itself(tmp_path: Path) -> None:
    rows = [{**CHOICE, "query": f"Number {word} is"} for word in ("one", "two", "three")]
    tasks = read_tasks(write(tmp_path, TASK.replace("[0]", "9"), *rows))
    tokenizer = load_tokenizer()
    (part,) = Benchmark(tasks, tokenizer, max_seq_len=64).parts
    for prompt, row in zip(part.subsets[0].prompts(None), rows, strict=True):
        text = tokenizer.decode(prompt.pairs[0][0])
        assert [text.count(str(other["query"])) for other in rows] == [1, 1, 1]
        assert text.endswith(str(row["query"]))
        assert tokenizer.decode(prompt.pairs[0][1]) == " four"


def test_labels_and_files_select(tmp_path: Path) -> None:
    path = write(tmp_path, TASK, CHOICE)
    assert [task.label for task in select(["piqa", "arc_easy"], None)] == ["arc_easy", "piqa"]
    assert [task.label for task in select([str(path)], None)] == ["sums"]
    with pytest.raises(ValueError, match="no task is called arc_esy; did you mean arc_easy"):
        select(["arc_esy"], None)


def test_the_gauntlet_names_its_own_tasks() -> None:
    names = {task.name(shots) for task in read_tasks(TASKS) for shots in task.num_fewshot}
    assert set(read_gauntlet(GAUNTLET).baselines) <= names
