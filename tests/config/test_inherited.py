"""A run that begins with weights has their model, as far as it does not say otherwise."""

import json
from pathlib import Path

import pytest

from dbrx_train.config import ConfigError, RunConfig, load, to_yaml
from dbrx_train.model.config import DbrxConfig

MODEL = DbrxConfig(
    d_model=64,
    n_heads=4,
    n_kv_heads=2,
    n_layers=2,
    ffn_hidden_size=112,
    max_seq_len=128,
    clip_qkv=3.0,
    balance_loss_weight=0.7,
)


def run(tmp_path: Path, init_from: Path | None, model: str = "") -> RunConfig:
    path = tmp_path / "run.yaml"
    begins = "" if init_from is None else f"init_from: {{path: {init_from}}}\n"
    data = "data: {seq_len: 64, sources: {web: {local: data/web}}}\n"
    path.write_text(f"run_name: x\nmax_duration: 100ba\n{begins}{model}{data}")
    return load(path)


def hugging_face(folder: Path) -> None:
    (folder / "config.json").write_text(json.dumps(MODEL.to_hf()))


def a_run(folder: Path) -> None:
    shape = "{" + ", ".join(f"{key}: {json.dumps(value)}" for key, value in MODEL.to_dict().items()) + "}"
    (folder / "config.yaml").write_text(to_yaml(run(folder, None, f"model: {shape}\n")))


def a_checkpoint(folder: Path) -> None:
    older = MODEL.to_dict() | {"an_option_that_is_no_more": 1}
    (folder / "checkpoint.json").write_text(json.dumps({"config": {"model": older}}))


@pytest.mark.parametrize("made", [hugging_face, a_run, a_checkpoint])
def test_the_weights_say_what_model_it_is(tmp_path: Path, made) -> None:  # type: ignore[no-untyped-def]
    weights = tmp_path / "weights"
    weights.mkdir()
    made(weights)
    found = run(tmp_path, weights).model
    assert (found.d_model, found.n_layers, found.clip_qkv) == (64, 2, 3.0)
    assert found.balance_loss_weight == DbrxConfig().balance_loss_weight, "how to train is the run's own"
    own = run(tmp_path, weights, "model: {clip_qkv: 8, router_jitter: 0.1}\n").model
    assert (own.d_model, own.clip_qkv, own.router_jitter) == (64, 8.0, 0.1)


def test_no_model_is_taken_without_a_word(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"run.yaml: model: is missing; give its shape"):
        run(tmp_path, None)
    with pytest.raises(ConfigError, match=r"init_from.path: .*/nowhere does not say what model it is"):
        run(tmp_path, tmp_path / "nowhere")
    torn = tmp_path / "torn"
    torn.mkdir()
    (torn / "checkpoint.json").write_text("{")
    with pytest.raises(ConfigError, match=r"does not say what model it is"):
        run(tmp_path, torn)
    assert run(tmp_path, torn, "model: {n_layers: 2}\n").model.n_layers == 2
