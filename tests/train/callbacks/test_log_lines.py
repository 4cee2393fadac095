"""What a log shows of training."""

from __future__ import annotations

import re
from pathlib import Path

import pytest
from tiny_run import mlflow_run, run_yaml

from dbrx_train.config import load
from dbrx_train.train.callbacks.log_lines import _duration
from dbrx_train.train.run import run


def test_without_a_terminal_a_line_every_interval_says_how_training_goes(
    workplace: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    options = ["max_duration=4ba", "evaluation.max_samples=0", "data.mix=[]", "logging.peak_flops=1e12"]
    run(load(run_yaml(workplace, tmp_path, "logged"), [*options, "logging.progress=true"]))
    lines = [line for line in capsys.readouterr().out.splitlines() if line.startswith("step ")]
    client, found = mlflow_run(workplace, "logged")

    def logged(metric: str, step: int) -> float:
        history = client.get_metric_history(found.info.run_id, metric)
        return next(point.value for point in history if point.step == step)

    assert len(lines) == 2
    for line, step in zip(lines, (2, 4), strict=True):
        said = re.fullmatch(
            r"step (\d) of 4, (\d+) tokens: loss ([\d.]+), lr ([\d.e-]+), norm ([\d.]+), [\d,]+ tokens/s, "
            r"MFU [\d.]+%, [\d.]+ GB, 0m \d+s left",
            line,
        )
        assert said, line
        assert (int(said[1]), int(said[2])) == (step, step * 4 * 32)
        assert float(said[3]) == pytest.approx(logged("loss/train/total", step - 1), abs=1e-4)
        assert float(said[5]) == pytest.approx(logged("gradients/norm", step - 1), rel=5e-3)


@pytest.mark.parametrize(
    ("seconds", "text"), [(0.4, "0m 0s"), (61, "1m 1s"), (3599.6, "1h 0m"), (90_000, "1d 1h")]
)
def test_a_duration_has_two_units(seconds: float, text: str) -> None:
    assert _duration(seconds) == text
