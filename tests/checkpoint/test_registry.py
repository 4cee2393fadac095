"""Checkpoints in MLflow's model registry: by reference, with all that is known of them."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest
import torch
from unity_catalog import unity_catalog
from warm import Runs

from dbrx_train.checkpoint import folder as folders
from dbrx_train.checkpoint.huggingface import export, import_folder
from dbrx_train.checkpoint.registry import Registered, register, resolve
from dbrx_train.checkpoint.weights import open_weights

NAME = "tiny"


@pytest.fixture(scope="module")
def run(runs: Runs) -> Path:
    options = ("max_duration=3ba", "evaluation.max_samples=4", "logging.interval=1ba")
    code, said = runs("registered", "checkpoints.keep=1", *options)
    assert code == 0, said
    return runs.folder("registered")


@pytest.fixture(scope="module")
def registered(run: Path) -> Registered:
    return register(run, NAME, print, alias="champion", licence="Apache-2.0")


@pytest.fixture
def store(run: Path, monkeypatch: pytest.MonkeyPatch) -> str:
    uri = f"sqlite:///{run.parent}/mlruns.db"
    monkeypatch.setenv("MLFLOW_TRACKING_URI", uri)
    return uri


def test_what_is_registered_is_known_by_its_alias(registered: Registered, run: Path, store: str) -> None:
    import mlflow

    version = mlflow.MlflowClient(store, store).get_model_version_by_alias(NAME, "champion")
    assert str(version.version) == registered.version
    assert version.run_id
    tags = version.tags
    assert (tags["run_name"], tags["step"], tags["tokens"]) == ("registered", "3", "384")
    assert tags["licence"] == "Apache-2.0"
    assert tags["command"] == registered.command == "dbrx-train generate models:/tiny@champion PROMPT"
    assert set(registered.card.metrics) == {
        "metrics/eval/web/cross_entropy",
        "metrics/eval/code/cross_entropy",
        "loss/train/cross_entropy",
    }
    assert "  web: " in version.description
    checkpoint = run / "checkpoints" / "ba3"
    for name in (f"models:/{NAME}@champion", f"models:/{NAME}/{registered.version}"):
        assert resolve(Path(name)) == checkpoint
        weights = open_weights(Path(name), print)
        assert weights.path == checkpoint
        weights.close()
    stored = (
        [path for path in (run.parent / "mlruns").rglob("*") if path.is_file()]
        if (run.parent / "mlruns").exists()
        else []
    )
    assert sum(path.stat().st_size for path in stored) < 100_000, "a card, no weights"


def test_an_imported_export_is_registered_where_it_lies(run: Path, tmp_path: Path, store: str) -> None:
    export(run, tmp_path / "hf", torch.float32, print)
    import_folder(tmp_path / "hf", tmp_path / "imported")
    found = register(tmp_path / "imported", "imported", print, tracking_uri=store)
    assert found.card.lineage["run"] == "registered", "whose data it has seen"
    assert resolve(Path(found.reference)).is_relative_to(tmp_path / "imported")


def test_mlflow_loads_it(registered: Registered, store: str) -> None:
    import mlflow

    model = mlflow.pyfunc.load_model(f"models:/{NAME}@champion")
    texts = model.predict([{"prompt": "the model"}, {"prompt": "a token"}], params={"max_new_tokens": 3})
    assert len(texts) == 2
    assert all(isinstance(text, str) for text in texts)


def test_a_run_begins_with_it(registered: Registered, runs: Runs, store: str) -> None:
    code, said = runs(
        "begun", "init_from.path=models:/tiny@champion", "max_duration=1ba", "evaluation.max_samples=0"
    )
    assert code == 0, said
    (found,) = folders.saved(runs.checkpoints("begun"))
    facts = folders.read(found).metadata
    assert facts["config"]["init_from"]["path"] == str(runs.checkpoints("registered") / "ba3")
    assert (facts["base"]["run"], facts["base"]["step"]) == ("registered", 3)


def test_it_is_not_pruned(registered: Registered, runs: Runs) -> None:
    code, said = runs("registered", "max_duration=5ba", "checkpoints.keep=1")
    assert code == 0, said
    assert {path.name for path in folders.saved(runs.checkpoints("registered"))} == {"ba3", "ba5"}


def test_what_cannot_be_registered_or_found_is_one_line(
    registered: Registered, run: Path, store: str, tmp_path: Path
) -> None:
    for name, said in (
        ("models:/tiny@none", "none"),
        ("models:/none/1", "none"),
        ("models:/tiny", "names no model; must be models:/NAME@ALIAS or models:/NAME/VERSION"),
    ):
        with pytest.raises(ValueError, match=said) as caught:
            resolve(Path(name))
        assert "\n" not in str(caught.value)
    with pytest.raises(ValueError, match="no such file"):
        resolve(Path("models:/tiny/1"), f"sqlite:///{tmp_path}/none.db")
    with pytest.raises(ValueError, match="neither a run with checkpoints nor a checkpoint"):
        register(tmp_path, NAME, print)
    with pytest.raises(ValueError, match=r"mlruns\.db: .*\S"):
        register(run, "a/b", print)
    copy = tmp_path / "copy"
    shutil.copytree(run / "checkpoints" / "ba3", copy)
    other = register(copy, NAME, print, tracking_uri=store)
    manifest = copy / "checkpoint.json"
    manifest.write_text(manifest.read_text() + "\n")
    with pytest.raises(ValueError, match="is another checkpoint than the one that was registered"):
        resolve(Path(other.reference))
    shutil.rmtree(copy)
    with pytest.raises(ValueError, match=r"copy cannot be read \(No such file or directory\)"):
        resolve(Path(other.reference))


def test_unity_catalog_takes_it(
    registered: Registered, run: Path, store: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with unity_catalog(tmp_path) as (uri, asked):
        name = "main.models.tiny"
        for version in ("1", "2"):
            assert register(run, name, print, registry_uri=uri).version == version
        assert any("finalize" in line for line in asked)
        monkeypatch.setenv("MLFLOW_REGISTRY_URI", uri)
        assert resolve(Path(f"models:/{name}/2")).parent == run / "checkpoints"
        with pytest.raises(ValueError, match=r"--alias: uc:http.* takes none"):
            register(run, name, print, registry_uri=uri, alias="champion")
        with pytest.raises(ValueError, match="is not there"):
            resolve(Path(f"models:/{name}/9"))
    assert sum(path.stat().st_size for path in tmp_path.rglob("*") if path.is_file()) < 200_000
