"""``eval --tasks``: table, JSON, examples; going on after an interruption; mistakes in one line."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

import pytest
from foundry import FOUNDRY, golden_model

from dbrx_train import cli
from dbrx_train.evaluate import records
from dbrx_train.evaluate.alone import Asked, evaluate
from dbrx_train.evaluate.outcomes import Outcome

TASKS = str(FOUNDRY / "tasks.yaml")
LABELS = ["arc_easy", "capitals", "winograd", "simple_arithmetic_withspaces"]


@pytest.fixture(scope="module")
def weights(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("weights") / "hf"
    golden_model().save_pretrained(folder)
    return folder


def asked(path: Path, **options: Any) -> Asked:
    return Asked(tasks=[TASKS, *LABELS], json=path, limit=3, max_seq_len=256, **options)


def lines(path: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in path.read_text().splitlines()]


def test_results_are_a_table_and_two_files(weights: Path, tmp_path: Path) -> None:
    said = list[str]()
    shown = evaluate(weights, asked(tmp_path / "out.json"), said.append)
    found = json.loads((tmp_path / "out.json").read_text())
    tasks, examples = found["tasks"], lines(tmp_path / "out.jsonl")
    assert list(tasks) == [
        "arc_easy/3-shot",
        "winograd/3-shot",
        "simple_arithmetic_withspaces/5-shot",
        "capitals/2-shot",
    ]
    assert tasks["arc_easy/3-shot"]["metric"] == "InContextLearningMultipleChoiceAccuracy"
    assert tasks["arc_easy/3-shot"]["examples"] == 3
    assert tasks["capitals/2-shot"]["examples"] == 9, "the limit is of each category"
    assert tasks["capitals/2-shot"]["categories"].keys() == {"africa", "asia", "europe"}
    for name, task in tasks.items():
        scores = [each["score"] for each in examples if each["task"] == name]
        assert sum(scores) / len(scores) == pytest.approx(task["score"])
        assert len(scores) == task["examples"]
        assert any(line.split()[:2] == [name, str(task["examples"])] for line in shown.splitlines())
    assert all(each["prompt"] and each["continuation"] for each in examples)
    assert found["gauntlet"]["categories"]["world_knowledge"]["missing"]
    assert "world_knowledge (partial" in shown


def test_an_interrupted_evaluation_goes_on_where_it_was(
    weights: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    whole = evaluate(weights, asked(tmp_path / "whole.json"), print)
    add, added = records.Records.add, list[Outcome]()

    def interrupted(self: records.Records, outcome: Outcome) -> None:
        if len(added) == 7:
            raise KeyboardInterrupt
        added.append(outcome)
        add(self, outcome)

    monkeypatch.setattr(records.Records, "add", interrupted)
    with pytest.raises(KeyboardInterrupt):
        evaluate(weights, asked(tmp_path / "out.json"), print)
    with (tmp_path / "out.jsonl").open("a") as file:
        file.write('{"task": "torn')
    monkeypatch.setattr(records.Records, "add", lambda *both: (added.append(both[1]), add(*both)))
    assert evaluate(weights, asked(tmp_path / "out.json"), print) == whole
    keys = [(o.task, o.category, o.index) for o in added]
    assert len(keys) == len(set(keys)) == 18, "each example is evaluated once"
    results = [json.loads((tmp_path / f"{name}.json").read_text()) for name in ("out", "whole")]
    assert results[0] == results[1]


def test_other_options_or_weights_do_not_go_on_in_the_same_file(weights: Path, tmp_path: Path) -> None:
    path = tmp_path / "out.json"
    evaluate(weights, asked(path), print)
    with pytest.raises(ValueError, match=r"out\.json: holds an evaluation of other tasks or options"):
        evaluate(weights, asked(path, as_foundry=True), print)
    model = golden_model()
    model.transformer.norm_f.weight.data.add_(1e-3)
    model.save_pretrained(tmp_path / "other")
    with pytest.raises(ValueError, match=r"out\.json: holds an evaluation of other weights"):
        evaluate(tmp_path / "other", asked(path), print)
    path.write_text("{}")
    with pytest.raises(ValueError, match=r"out\.json: exists, and is no evaluation"):
        evaluate(weights, asked(path), print)


@pytest.mark.parametrize(
    ("options", "said"),
    [
        (["--tasks", "gauntlet"], "no such file; --data names the folder (data of gsm8k and of"),
        (["--tasks", "gauntlet", "--skip-missing"], "of none of them the data is there"),
        (["--tasks", TASKS, "--tasks", "arc_esy"], "no task is called arc_esy; did you mean arc_easy?"),
        (["--tasks", TASKS, "--max-seq-len", "9999"], "--max-seq-len: must be at most the model's 512"),
        (["--tasks", "nowhere.yaml"], "nowhere.yaml: No such file"),
        (["--json", "x.json"], "--tasks: not given, and all other options but"),
    ],
)
def test_mistakes_are_one_line(
    weights: Path,
    options: list[str],
    said: str,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.setattr(sys, "argv", ["dbrx-train", "eval", str(weights), *options])
    with pytest.raises(SystemExit) as ended:
        cli.main()
    assert ended.value.code == 2
    shown = capsys.readouterr().err.splitlines()[-1]
    assert said in shown, shown
