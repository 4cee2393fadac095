"""TensorBoard and Weights & Biases get a run's metrics, where the YAML asks for them."""

from __future__ import annotations

import importlib.util
from pathlib import Path

import pytest
from tiny_run import mlflow_run, run_yaml

from dbrx_train.config import ConfigError, load
from dbrx_train.train.run import run
from dbrx_train.train.tracking.description import description
from dbrx_train.train.tracking.installed import check_trackers


def installed(name: str) -> bool:
    return importlib.util.find_spec(name) is not None


@pytest.mark.parametrize("name", ["tensorboard", "wandb"])
def test_a_tracker_that_is_not_installed_is_one_line(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: str
) -> None:
    config = load(run_yaml(tmp_path, tmp_path, "run"), [f"logging.{name}=true"])
    monkeypatch.setattr(importlib.util, "find_spec", lambda _: None)
    says = rf"^logging.{name}: is not installed; pip install 'dbrx-train\[{name}\]'$"
    with pytest.raises(ConfigError, match=says):
        check_trackers(config)


@pytest.mark.slow
@pytest.mark.skipif(not (installed("tensorboard") or installed("wandb")), reason="needs an extra")
def test_each_has_the_losses_that_mlflow_has(
    workplace: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("WANDB_MODE", "offline")
    options = ["max_duration=4ba", "evaluation.max_samples=0"]
    options += [f"logging.{name}=true" for name in ("tensorboard", "wandb") if installed(name)]
    config = load(run_yaml(workplace, tmp_path, "trackers"), options)
    run(config)
    client, found = mlflow_run(workplace, "trackers")
    assert found.data.tags["mlflow.note.content"] == description(config, 1)
    assert found.data.tags["mlflow.user"]
    history = client.get_metric_history(found.info.run_id, "loss/train/total")
    losses = {point.step: point.value for point in history}
    if installed("tensorboard"):
        from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

        (folder,) = (tmp_path / "trackers" / "tensorboard").iterdir()
        events = EventAccumulator(str(folder)).Reload()
        shown = {each.step: each.value for each in events.Scalars("loss/train/total")}
        assert shown == pytest.approx(losses)
    if installed("wandb"):
        (kept,) = (tmp_path / "trackers" / "wandb").glob("offline-run-*/*.wandb")
        assert kept.stat().st_size > 0


def test_the_description_says_what_the_run_is(tmp_path: Path) -> None:
    config = load(run_yaml(tmp_path, tmp_path, "told"), ["init_from.path=null"])
    said = description(config, 2)
    assert said.startswith("**told**: ")
    assert "1,024 tokens in 8 steps" in said
    assert "4 samples of 32 tokens, on 2 ranks" in said
    assert "mix from 0.75dur on (linear): web 0.25, code 0.75" in said
