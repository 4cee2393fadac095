"""In-context tasks during training: the same on any mesh, logged, and refused in time."""

from __future__ import annotations

from pathlib import Path

import pytest
from tiny_run import mlflow_run, run_yaml
from tiny_tasks import TYPES, write_tasks
from warm import Warm

from dbrx_train.checkpoint.weights import load_model, open_weights
from dbrx_train.config import load
from dbrx_train.data.tokenizer import load_tokenizer
from dbrx_train.evaluate.outcomes import result
from dbrx_train.report import read, render
from dbrx_train.train.callbacks.tasks import task_benchmark
from dbrx_train.train.run import run


@pytest.mark.slow
def test_tasks_on_spread_experts_are_those_of_the_saved_weights(
    workplace: Path, tmp_path: Path, warm: Warm
) -> None:
    path = run_yaml(workplace, tmp_path, "spread")
    options = [f"evaluation.tasks=[{write_tasks(tmp_path)}]", "evaluation.tasks_limit=4", "max_duration=4ba"]
    codes, said = warm.ranks("train", str(path), *options, "parallelism.expert=2", ranks=2)
    assert codes == [0, 0], said
    assert "in-context tasks: 16 examples, " in str(said)
    client, found = mlflow_run(workplace, "spread")
    config = load(path, options)
    benchmark = task_benchmark(config, load_tokenizer(config.tokenizer.name, config.tokenizer.vocab_file))
    assert benchmark is not None
    model = load_model(open_weights(tmp_path / "spread", print)).eval()
    for part, kind in zip(benchmark.parts, TYPES, strict=True):
        alone = result(part.task, list(benchmark.run(model, part)))
        logged = {
            name: found.data.metrics.get(f"tasks/{kind}/1-shot/{name}") for name in ("score", "bits_per_byte")
        }
        assert logged["score"] == pytest.approx(alone.score)
        assert logged["bits_per_byte"] == (
            alone.bits_per_byte and pytest.approx(alone.bits_per_byte, rel=1e-5)
        )
        history = client.get_metric_history(found.info.run_id, f"tasks/{kind}/1-shot/score")
        assert [point.step for point in history] == [0, 4]
    page = render(read(tmp_path / "spread"))
    assert "In-context tasks" in page
    assert '"multiple_choice/1-shot"' in page


def test_a_task_that_is_wrong_stops_a_run_before_it_begins(workplace: Path, tmp_path: Path) -> None:
    path = run_yaml(workplace, tmp_path, "refused")
    with pytest.raises(ValueError, match=r"evaluation\.tasks: .*no task is called arc_esy"):
        run(load(path, ["evaluation.tasks=[arc_esy]"]))
    with pytest.raises(ValueError, match=r"evaluation\.tasks: eval/.*arc_easy\.jsonl: no such file"):
        run(load(path, ["evaluation.tasks=[arc_easy]"]))
