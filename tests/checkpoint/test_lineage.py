"""From weights to the files that they were trained on, and back."""

from __future__ import annotations

import itertools
import json
import shutil
from dataclasses import replace
from pathlib import Path

import pytest
from warm import Runs

from dbrx_train.checkpoint import folder as folders
from dbrx_train.checkpoint.lineage import (
    Lineage,
    SourceLineage,
    as_json,
    describe,
    describe_seen,
    of_checkpoint,
    read,
    seen_as_json,
    shards_of,
)
from dbrx_train.data.governance import Governance
from dbrx_train.data.manifest import read_manifest, write_manifest
from dbrx_train.data.mds import fingerprint

SHORT = ("checkpoints.interval=3ba", "checkpoints.keep=9", "logging.interval=1ba")


@pytest.fixture(scope="module")
def parent(runs: Runs) -> Path:
    """A run of nine steps, in two starts, on two sources."""
    for end in ("6ba", "9ba"):
        code, said = runs("parent", f"max_duration={end}", *SHORT)
        assert code == 0, said
    return runs.folder("parent")


def tokens_read(run: Path, name: str, step: int) -> int:
    """Of a source, as MLflow knows it."""
    import mlflow

    client = mlflow.MlflowClient(f"sqlite:///{run.parent}/mlruns.db")
    experiment = client.get_experiment_by_name("dbrx-train")
    assert experiment is not None
    (found,) = client.search_runs([experiment.experiment_id], f"tags.run_name = '{run.name}'")
    logged = {(each.dataset.name, each.dataset.digest): each for each in found.inputs.dataset_inputs}
    assert len(logged) == len(found.inputs.dataset_inputs) == 2, "once, though it was started twice"
    points = {m.step: m.value for m in client.get_metric_history(found.info.run_id, f"mix/{name}/tokens")}
    return int(points[step])


@pytest.mark.slow
def test_a_checkpoint_names_its_sources_files_and_tokens(parent: Path, workplace: Path) -> None:
    for step in (3, 6, 9):
        lineage = of_checkpoint(folders.read(parent / "checkpoints" / f"ba{step}"))
        assert (lineage.run, lineage.step, lineage.tokens) == ("parent", step, step * 4 * 32)
        assert sum(source.tokens for source in lineage.sources) == lineage.tokens
    found = {source["name"]: source for source in as_json(lineage)["sources"]}
    for name in ("web", "code"):
        files = sorted((workplace / "text" / name).iterdir())
        assert [file["path"] for file in found[name]["files"]] == [str(file) for file in files]
    lines = "\n".join(describe(lineage, most=5))
    assert "… and 55 files more; --json lists all" in lines
    assert f"  code: {found['code']['tokens']:,} tokens by step 9, " in lines
    sixth = of_checkpoint(folders.read(parent / "checkpoints" / "ba6"))
    assert {s.name: s.tokens for s in sixth.sources}["web"] == tokens_read(parent, "web", 6)


def test_a_source_names_the_checkpoints_that_saw_it(parent: Path, workplace: Path, tmp_path: Path) -> None:
    moved = tmp_path / "moved"
    shutil.copytree(workplace / "web", moved)
    manifest = read_manifest(moved)
    write_manifest(moved, replace(manifest, governance=Governance("MIT")))  # another digest, the same data
    seen = [each for each in seen_as_json(moved, parent.parent) if each["run"] == "parent"]
    assert [(each["step"], each["source"]) for each in seen] == [(3, "web"), (6, "web"), (9, "web")]
    assert all(a["tokens"] < b["tokens"] for a, b in itertools.pairwise(seen))
    lines = list(describe_seen(workplace / "code", parent))
    assert lines[0].endswith(f"seen by 3 checkpoints in {parent}")
    with pytest.raises(ValueError, match="no such file or folder"):
        seen_as_json(moved, tmp_path / "none")


def test_a_tracking_store_names_the_runs_that_read_a_source(
    parent: Path, workplace: Path, tmp_path: Path
) -> None:
    from dbrx_train.train.tracking.lineage import runs_that_read

    moved, uri = tmp_path / "moved", f"sqlite:///{parent.parent}/mlruns.db"
    shutil.copytree(workplace / "web", moved)
    (moved / "manifest.json").write_text((moved / "manifest.json").read_text() + "\n")
    (found,) = (each for each in runs_that_read(uri, moved, shards_of(moved)) if each.run_name == "parent")
    assert found.source == "web"
    assert "tokens by step" in str(found)
    other = [(samples, packed + b" ") for samples, packed in shards_of(moved)]
    assert not list(runs_that_read(uri, moved, other))
    with pytest.raises(ValueError, match=r"--tracking-uri: .*: no such file"):
        list(runs_that_read(f"sqlite:///{tmp_path}/none.db", moved, other))


def test_what_a_run_was_begun_from_is_part_of_its_lineage(
    parent: Path, runs: Runs, workplace: Path, tmp_path: Path
) -> None:
    base = tmp_path / "base"
    shutil.copytree(parent / "checkpoints" / "ba6", base)
    options = ("data.mix=[{at: 0tok, weights: {code: 1.0}}]", f"init_from.path={base}", *SHORT)
    for end in ("3ba", "6ba"):
        code, said = runs("child", f"max_duration={end}", *options)
        assert code == 0, said
        shutil.rmtree(base, ignore_errors=True)  # what it was is known from the first start
        options = (*options, "evaluation.max_samples=0")
    lineage = read(runs.folder("child"), print)
    assert lineage.base is not None
    assert (lineage.base.run, lineage.base.step) == ("parent", 6)
    assert {source.name: source.tokens for source in lineage.sources} == {"code": 6 * 4 * 32, "web": 0}
    seen = [each for each in seen_as_json(workplace / "web", runs.folder("child")) if each["tokens"]]
    assert [(each["step"], each["through"]) for each in seen] == [(6, str(base))] * 2
    lines = "\n".join(describe(lineage, most=1))
    assert f"begun from {base}: run parent, step 6, 768 tokens" in lines
    assert "60 raw files" in lines
    assert Lineage.from_dict(json.loads(json.dumps(lineage.to_dict()))) == lineage


def test_appended_shards_leave_a_source_the_same() -> None:
    shards = [(10, f"shard {i}".encode()) for i in range(5)]
    first = SourceLineage("web", 1, 1, [2], [fingerprint(shards[:2])])
    later = SourceLineage("web", 1, 1, [2, 4], [fingerprint(shards[:2]), fingerprint(shards[2:4])])
    assert first.is_in(shards[:2])
    assert first.is_in(shards)
    assert later.is_in(shards)
    assert later.is_in(shards[:2]), "an earlier state of the folder"
    assert not first.is_in(shards[1:])
    assert not later.is_in([*shards[:3], (10, b"another"), shards[4]])
    assert not first.is_in([])


def test_what_may_not_be_trained_on_is_refused(runs: Runs, workplace: Path, tmp_path: Path) -> None:
    for name, allowed in (("mine", ["eval"]), ("theirs", ["train"])):
        shutil.copytree(workplace / "web", tmp_path / name)
        manifest = read_manifest(tmp_path / name)
        write_manifest(tmp_path / name, replace(manifest, governance=Governance(allowed=allowed)))
    code, said = runs("refused", f"data.sources.web.local={tmp_path}/mine")
    assert code == 2
    assert f"data.sources.web: {tmp_path}/mine: may be used for eval alone, and the mix trains on it" in said
    assert not runs.folder("refused").exists()
    allowed = ("evaluation.max_samples=4", "max_duration=1ba", "data.mix=[{at: 0tok, weights: {code: 1}}]")
    code, said = runs("allowed", f"data.sources.web.local={tmp_path}/mine", *allowed)
    assert code == 0, said
    assert "held-out web" in said
    code, said = runs("unseen", f"data.sources.web.local={tmp_path}/theirs", *allowed[:2])
    assert code == 0, said
    assert f"data.sources.web: {tmp_path}/theirs may be used for train alone, so it is not evaluated" in said
    assert "held-out web" not in said


def test_an_export_has_a_card_and_keeps_the_lineage(parent: Path, tmp_path: Path) -> None:
    import torch

    from dbrx_train.checkpoint.huggingface import export, import_folder
    from dbrx_train.checkpoint.weights import consolidate

    out = tmp_path / "hf"
    run = tmp_path / "run"
    shutil.copytree(parent / "checkpoints" / "ba9", run)
    facts = json.loads((run / folders.MANIFEST).read_text())
    facts["made_by"]["sources"]["web"]["governance"] = {
        "licence": "CC-BY-4.0",
        "owner": "us",
        "allowed": ["train"],
    }
    facts.pop("seal")
    folders.commit(run, facts)
    export(run, out, torch.float32, print)
    lineage = read(run, print)
    web = next(source for source in lineage.sources if source.name == "web")
    card = (out / "README.md").read_text()
    assert f"| web | {web.tokens:,} | {web.tokens / 1152:.1%} | CC-BY-4.0 | us | not said | train |" in card
    assert "| from | web | code | how |" in card
    assert "| 0tok | 1 | 1 | step |" in card
    assert read(out, print) == lineage
    import_folder(out, tmp_path / "imported")
    assert read(tmp_path / "imported", print) == lineage
    consolidate(run, tmp_path / "all.safetensors", torch.float32, print)
    assert read(tmp_path / "all.safetensors", print) == lineage
    shutil.rmtree(run)
    (seen,) = seen_as_json(Path(web.folder), tmp_path)
    assert seen["checkpoint"] == str(tmp_path / "imported")
