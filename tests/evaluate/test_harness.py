"""lm-eval's tasks give what its own `hf` model gives of the export."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from foundry import golden_model

from dbrx_train.checkpoint.huggingface import export

pytest.importorskip("lm_eval", reason="lm-eval is not installed: pip install 'dbrx-train[eval]'")

WORDS = ("the river runs past the old town", "two and two are four", "a lion sleeps", "def main(x): return x")
COMMON = """dataset_path: json
dataset_name: null
dataset_kwargs: {{data_files: {data}}}
test_split: train
"""
TASKS = {
    "choices": """task: choices
output_type: multiple_choice
doc_to_text: "{{question}}\\nAnswer:"
doc_to_choice: "{{choices}}"
doc_to_target: gold
num_fewshot: 2
fewshot_split: train
metric_list: [{metric: acc}, {metric: acc_norm}]
""",
    "rolling": """task: rolling
output_type: loglikelihood_rolling
doc_to_text: ""
doc_to_target: "{{text}}"
metric_list: [{metric: word_perplexity}, {metric: bits_per_byte}]
""",
    "writing": """task: writing
output_type: generate_until
doc_to_text: "{{question}} ->"
doc_to_target: "{{answer}}"
generation_kwargs: {until: ["\\n\\n", " the"], max_gen_toks: 12, do_sample: false}
metric_list: [{metric: exact_match}]
""",
}


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """An export, and tasks of all kinds on local files."""
    path = tmp_path_factory.mktemp("harness")
    golden_model().save_pretrained(path / "weights")
    export(path / "weights", path / "hf", torch.float32, print)
    rows = [
        {
            "question": f"{text} {n}" if n else "",
            "choices": [" four", " a river " + "runs " * n, " 4"],
            "gold": n % 3,
            "text": f"{text}. " * (1 + 40 * (n % 3)),
            "answer": text,
        }
        for n, text in enumerate(WORDS * 3)
    ]
    (path / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    for name, task in TASKS.items():
        (path / f"{name}.yaml").write_text(task + COMMON.format(data=path / "rows.jsonl"))
    return path


def evaluated(folder: Path, model: str, arguments: str) -> dict[str, Any]:
    import lm_eval
    from lm_eval.tasks import TaskManager

    import dbrx_train.evaluate.harness  # noqa: F401  (registers the model)

    found: dict[str, Any] = lm_eval.simple_evaluate(
        model=model,
        model_args=arguments,
        tasks=list(TASKS),
        task_manager=TaskManager(include_path=str(folder), include_defaults=False),
        device="cpu",
        batch_size=2,
        bootstrap_iters=0,
        random_seed=0,
        cache_requests=False,
    )
    return found


@pytest.mark.slow
def test_results_are_those_of_the_harness_on_the_export(
    folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    try:
        import lm_eval.models.huggingface  # noqa: F401
    except ModuleNotFoundError as error:
        pytest.skip(f"lm-eval's hf model is not installed ({error}): pip install 'lm-eval[hf]'")
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    monkeypatch.setenv("HF_DATASETS_CACHE", str(folder / "cache"))
    limits = "max_length=96"
    theirs = evaluated(folder, "hf", f"pretrained={folder / 'hf'},dtype=float32,{limits}")
    ours = evaluated(folder, "dbrx_train", f"path={folder / 'hf'},{limits}")
    for task, metrics in theirs["results"].items():
        for name, value in metrics.items():
            if isinstance(value, float):
                assert ours["results"][task][name] == pytest.approx(value, rel=1e-4), (task, name)
    for task, samples in theirs["samples"].items():
        for mine, other in zip(ours["samples"][task], samples, strict=True):
            _check(mine["resps"], other["resps"])
    assert any(len(sample["resps"][0][0]) > 3 for sample in ours["samples"]["writing"])


@pytest.mark.slow
def test_the_command_is_the_harness_with_this_model(
    folder: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    from dbrx_train import cli

    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    monkeypatch.setenv("HF_DATASETS_CACHE", str(folder / "cache"))
    options = ["--model_args", f"path={folder / 'weights'}", "--include_path", str(folder)]
    arguments = ["dbrx-train", "lm-eval", *options, "--tasks", "choices", "--limit", "2"]
    monkeypatch.setattr(sys, "argv", arguments)
    with pytest.raises(SystemExit) as caught:
        cli.main()
    assert not caught.value.code
    assert "|choices|" in capsys.readouterr().out


def _check(mine: Any, other: Any) -> None:
    if isinstance(other, list | tuple):
        for a, b in zip(mine, other, strict=True):
            _check(a, b)
    elif isinstance(other, float):
        assert float(mine) == pytest.approx(other, rel=1e-5, abs=1e-3)  # of float32 sums over 100,352 words
    else:
        assert mine == other


@pytest.mark.skipif(torch.cuda.is_available(), reason="about machines without a GPU")
def test_a_gpu_that_is_not_there_is_not_used(folder: Path) -> None:
    from dbrx_train.evaluate.harness import DbrxLM

    assert DbrxLM(str(folder / "hf"), device="cuda:0").where.type == "cpu"


@pytest.mark.parametrize(
    ("options", "said"),
    [
        ({"max_length": 9999}, "^max_length: must be at most the model's 512"),
        ({"dtype": "float8"}, "^dtype: must be float32 or bfloat16, not float8"),
    ],
)
def test_mistakes_are_one_line(folder: Path, options: dict[str, Any], said: str) -> None:
    from dbrx_train.evaluate.harness import DbrxLM

    with pytest.raises(ValueError, match=said):
        DbrxLM(str(folder / "hf"), **options)
