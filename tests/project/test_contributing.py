"""The worked examples of CONTRIBUTING.md do what they say."""

from __future__ import annotations

import dataclasses
import re
import sys
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType
from typing import Any

import mlflow
import pytest
import torch
from paths import ROOT
from tiny_run import run_yaml

from dbrx_train import DbrxConfig
from dbrx_train.config import OptimizerConfig, load
from dbrx_train.model.config import EXPERT_IMPLS
from dbrx_train.model.hf import names
from dbrx_train.model.moe.experts import EXPERT_FNS
from dbrx_train.train import run, trainer
from dbrx_train.train.callbacks import order
from dbrx_train.train.optim import OPTIMIZERS

TEXT = (ROOT / "CONTRIBUTING.md").read_text()
EXAMPLES = {
    title: code
    for section in TEXT.split("\n## ")[1:]
    for title, code in [(section.splitlines()[0], re.findall(r"```python\n(.*?)```", section, re.DOTALL)[0])]
}


@pytest.fixture(autouse=True)
def as_before() -> Iterator[None]:
    families, experts, optimizers = names.FAMILIES, dict(EXPERT_FNS), dict(OPTIMIZERS)
    yield
    names.FAMILIES = families
    for table, before in ((EXPERT_FNS, experts), (OPTIMIZERS, optimizers)):
        table.clear()
        table.update(before)  # type: ignore[arg-type]


def example(title: str) -> dict[str, Any]:
    module = ModuleType("example")
    sys.modules["example"] = module  # where dataclasses look for it
    exec(compile(EXAMPLES[title], title, "exec", dont_inherit=True), module.__dict__)
    return module.__dict__


def test_a_model_option(capsys: pytest.CaptureFixture[str]) -> None:
    example("A model option")
    assert capsys.readouterr().out == "embedding_scale: must be positive, not 0.0\n"


@pytest.mark.slow
def test_a_metric(workplace: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    metric = example("A metric")["SkippedShare"]

    def with_metric(*arguments: Any) -> list[Any]:
        return [*order.callbacks(*arguments)[:-1], metric(), order.callbacks(*arguments)[-1]]

    monkeypatch.setattr(trainer, "callbacks", with_metric)
    config = load(run_yaml(workplace, tmp_path, "metric"), ["max_duration=2ba", "evaluation.max_samples=0"])
    run.run(config)
    client = mlflow.MlflowClient(config.logging.mlflow_uri)
    experiment = client.get_experiment_by_name(config.logging.experiment)
    assert experiment is not None
    (found,) = client.search_runs([experiment.experiment_id], "tags.run_name = 'metric'")
    assert found.data.metrics["steps/skipped_share"] == 0


@pytest.mark.slow
def test_an_optimizer(workplace: Path, tmp_path: Path) -> None:
    example("An optimizer")
    options = ["max_duration=2ba", "evaluation.max_samples=0"]
    for duration in (2, 3):  # resumed, too
        config = load(
            run_yaml(workplace, tmp_path, "sgdm"), [*options, f"max_duration={duration}ba", "data.mix=[]"]
        )
        config.optimization.optimizer.name = "sgdm"
        run.run(config)
    assert (tmp_path / "sgdm" / "checkpoints" / "ba3").is_dir()


def test_an_expert_backend() -> None:
    example("An expert backend")
    generator = torch.Generator().manual_seed(0)
    counts = torch.tensor([3, 0, 5])
    shapes = ((8, 6), (8,), (3, 4, 6), (3, 4, 6), (3, 4, 6))
    leaves = [torch.randn(shape, generator=generator, dtype=torch.float64) for shape in shapes]
    found = []
    for name in ("loop", "padded"):
        inputs = [leaf.clone().requires_grad_() for leaf in leaves]
        y = EXPERT_FNS[name](*inputs, counts)
        y.square().sum().backward()
        found.append([y, *(each.grad for each in inputs)])
    for ours, theirs in zip(*found, strict=True):
        torch.testing.assert_close(ours, theirs)


def test_a_hugging_face_family() -> None:
    example("A Hugging Face family")
    config = DbrxConfig.from_hf({"model_type": "my-dbrx", "d_model": 64, "n_heads": 2})
    assert (config.d_model, config.n_layers) == (64, 24)
    (part,) = names.FAMILIES[-1].parts(config, "lm_head.weight", 7)
    assert part.name == "model.lm_head.weight"


def test_names_in_the_configuration_are_those_that_are_built() -> None:
    (field,) = (each for each in dataclasses.fields(OptimizerConfig) if each.name == "name")
    assert field.metadata["bounds"].one_of == tuple(OPTIMIZERS)
    assert set(EXPERT_IMPLS) == set(EXPERT_FNS)
