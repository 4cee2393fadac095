"""Training is not a metric: without the callbacks that only look, a run has the same weights."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from tiny_run import run_yaml, saved_tensors
from tiny_tasks import write_tasks

from dbrx_train.config import load
from dbrx_train.train import run, trainer
from dbrx_train.train.callbacks import order


@pytest.mark.slow
def test_without_any_metric_a_run_has_the_same_weights(
    workplace: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """With balancing that goes by the whole batch's load, and biases that move."""
    options = ["model.loss_free_bias_rate=0.01", "optimization.balance_over=global_batch", "max_duration=4ba"]
    options += ["evaluation.max_samples=0", "logging.activations=true", "profile.at=2ba"]
    options += [f"evaluation.tasks=[{write_tasks(tmp_path)}]", "evaluation.interval=1ba"]
    run.run(load(run_yaml(workplace, tmp_path, "watched"), options))
    found: list[str] = []

    def blind(*arguments: Any) -> list[Any]:
        made = order.callbacks(*arguments)
        found.extend(type(each).__name__ for each in made if isinstance(each, order.METRICS))
        return [each for each in made if not isinstance(each, order.METRICS)]

    monkeypatch.setattr(trainer, "callbacks", blind)
    run.run(load(run_yaml(workplace, tmp_path, "blind"), options))
    assert sorted(found) == sorted(kind.__name__ for kind in order.METRICS)
    watched, unseen = (saved_tensors(tmp_path / n / "checkpoints" / "ba4") for n in ("watched", "blind"))
    assert watched.keys() == unseen.keys()
    assert all(torch.equal(watched[name], unseen[name]) for name in watched)
    assert any(name.endswith("expert_bias") and tensor.any() for name, tensor in watched.items())
