"""A checkpoint counts only when it is whole, and fits every mesh."""

from __future__ import annotations

import base64
import json
import os
import pickle
import re
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from paths import HELPERS
from safetensors import safe_open
from safetensors.torch import load_file
from torch.distributed.checkpoint.filesystem import FileSystemReader, FileSystemWriter
from torch.distributed.checkpoint.metadata import BytesStorageMetadata
from warm import Warm

from dbrx_train.checkpoint import folder as folders
from dbrx_train.checkpoint.tensors import Reader, model_tensors, optimizer_tensors, write
from dbrx_train.checkpoint.verify import verify
from dbrx_train.checkpoint.weights import consolidate, load_model, open_weights, tokenizer_of
from dbrx_train.config import OptimizerConfig, RunConfig
from dbrx_train.data.tokenizer import load_tokenizer
from dbrx_train.evaluate.held_out import check_tokenizer
from dbrx_train.model.config import DbrxConfig
from dbrx_train.model.decoder import Dbrx
from dbrx_train.train.optim import build_optimizer

PROGRAM = str(HELPERS / "checkpoint_ranks.py")
MESHES = {
    1: [[1, 1, 1]],
    2: [[1, 2, 1], [2, 1, 1], [1, 2, 2]],
    4: [[1, 4, 1], [2, 2, 1], [1, 4, 4], [1, 4, 2], [2, 2, 2]],
}
CONFIG = DbrxConfig(
    d_model=16,
    n_layers=1,
    n_heads=2,
    n_kv_heads=1,
    ffn_hidden_size=7,
    num_experts=4,
    top_k=2,
    vocab_size=51,
    loss_free_bias_rate=0.1,
)
FACTS: dict[str, Any] = {
    "config": {"model": CONFIG.to_dict(), "tokenizer": {"name": "cl100k_base", "vocab_file": None}},
    "data": {},
    "time": {"batch": 3, "token": 96},
}


@pytest.fixture(scope="module")
def model() -> Dbrx:
    return Dbrx(CONFIG, seed=1)


@pytest.fixture
def checkpoint(model: Dbrx, tmp_path: Path) -> Path:
    path = folders.step_folder(tmp_path / "checkpoints", 3)
    optimizer = build_optimizer(model, OptimizerConfig())
    sizes = write(path, model_tensors(model) | optimizer_tensors(model, optimizer), None)
    folders.commit(path, FACTS | {"files": sizes})
    return path


def nobody(line: str) -> None:
    raise AssertionError(line)


@pytest.mark.slow
def test_saved_on_any_mesh_it_reads_on_any_other(tmp_path: Path, warm: Warm) -> None:
    for ranks, meshes in MESHES.items():
        warm.torchrun(ranks, PROGRAM, "save", str(tmp_path), json.dumps(meshes))
    assert len(list(tmp_path.iterdir())) == 18
    for ranks, meshes in MESHES.items():
        assert json.loads(warm.torchrun(ranks, PROGRAM, "read", str(tmp_path), json.dumps(meshes))) == []


@pytest.mark.parametrize("name", ["adamw", "lionw"])
def test_making_an_optimizers_state_changes_nothing_else(model: Dbrx, name: str) -> None:
    optimizer = build_optimizer(model, OptimizerConfig(name=name, weight_decay=0.5))
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    rates = [group["lr"] for group in optimizer.param_groups]
    grads = {parameter: torch.ones_like(parameter) for parameter in model.parameters()}
    for parameter, grad in grads.items():
        parameter.grad = grad
    found = optimizer_tensors(model, optimizer)
    assert len(found) == len(list(model.parameters())) * (3 if name == "adamw" else 1)
    assert not any(tensor.any() for tensor in found.values()), "also the count of steps"
    assert all(torch.equal(before[name], tensor) for name, tensor in model.state_dict().items())
    assert [group["lr"] for group in optimizer.param_groups] == rates
    assert all(parameter.grad is grad for parameter, grad in grads.items())
    model.zero_grad()


def test_what_befalls_a_rank_while_it_writes_is_an_error_like_others(
    model: Dbrx, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """torch makes a BaseException of it."""

    def killed(*_: Any) -> None:
        raise RuntimeError("DataLoader worker (pid 7) is killed by signal: Killed.")

    monkeypatch.setattr(FileSystemWriter, "write_data", killed)
    with pytest.raises(RuntimeError, match=r"ba3: DataLoader worker \(pid 7\) is killed by signal"):
        write(tmp_path / "ba3", model_tensors(model), None)


def test_without_its_mark_it_is_none(checkpoint: Path) -> None:
    root = checkpoint.parent
    assert folders.saved(root) == [checkpoint]
    assert folders.read(checkpoint).tokens == 96
    (checkpoint / folders.MANIFEST).unlink()
    assert folders.saved(root) == []
    assert folders.newest(root, nobody) is None
    folders.remove_torn(root)
    assert not checkpoint.exists()


@pytest.mark.parametrize(
    ("damage", "says"),
    [
        (lambda path: (path / "__0_0.distcp").unlink(), r"__0_0\.distcp is missing"),
        (lambda path: (path / "__0_0.distcp").open("ab").write(b"x"), r"__0_0\.distcp has [\d,]+ bytes, not"),
        (lambda path: (path / folders.MANIFEST).write_text("{"), "not a whole checkpoint"),
        (lambda path: (path / folders.MANIFEST).write_text("[]"), "not a whole checkpoint"),
        (lambda path: (path / folders.MANIFEST).write_text("{}"), "lacks entries"),
    ],
)
def test_what_is_not_whole_is_named_and_passed_over(checkpoint: Path, damage, says: str) -> None:  # type: ignore[no-untyped-def]
    damage(checkpoint)
    heard: list[str] = []
    assert folders.newest(checkpoint.parent, heard.append) is None
    (line,) = heard
    assert line.startswith(f"passed over {checkpoint}: ")
    with pytest.raises(ValueError, match=says):
        folders.read(checkpoint)


class Evil:
    def __reduce__(self) -> tuple[object, ...]:
        return eval, ("open('ran', 'w')",)


def evil_metadata(checkpoint: Path, how: str) -> bytes:
    """What reads like a checkpoint's metadata, but has other plans."""
    metadata = Reader(checkpoint).read_metadata()
    name = "model.lm_head.weight"
    places = [place for index, place in metadata.storage_data.items() if index.fqn == name]
    if how == "code":
        return pickle.dumps(Evil())
    if how == "code inside":
        metadata.planner_data = Evil()
    if how == "unpickled":  # by torch, which takes what is no tensor for an object
        (checkpoint / "__0_0.distcp").write_bytes(pickle.dumps(Evil()))
        metadata.state_dict_metadata[name] = BytesStorageMetadata()
    if how == "elsewhere":
        places[0].relative_path = "../../secret"
    return pickle.dumps(metadata)


@pytest.mark.parametrize(
    ("how", "says"),
    [
        ("code", r"builtins.eval has no place in it"),
        ("code inside", r"builtins.eval has no place in it"),
        ("unpickled", r"BytesStorageMetadata has no place in it"),
        ("elsewhere", r"names '../../secret'; must name files beside it alone"),
    ],
)
def test_no_code_in_a_checkpoint_is_run_and_no_other_file_read(
    checkpoint: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, how: str, says: str
) -> None:
    monkeypatch.chdir(tmp_path)
    (checkpoint / ".metadata").write_bytes(evil_metadata(checkpoint, how))
    with pytest.raises(ValueError, match=rf"metadata cannot be read \(.*{says}\)"):
        Reader(checkpoint).read({"model.lm_head.weight": torch.empty(51, 16)})
    assert not (tmp_path / "ran").exists()
    if how == "code":
        FileSystemReader(checkpoint).read_metadata()
        assert (tmp_path / "ran").exists(), "it would have run"


@pytest.mark.parametrize("name", ["../stolen", "/etc/passwd", "a/b", "..", ""])
def test_a_manifest_cannot_name_files_elsewhere(checkpoint: Path, name: str) -> None:
    facts = folders.parse(checkpoint)
    folders.commit(checkpoint, facts | {"files": {name: {"bytes": 1, "xxh3": "0"}}})
    with pytest.raises(ValueError, match="must name files beside it alone"):
        folders.read(checkpoint)


def test_the_newest_and_the_milestones_stay() -> None:
    steps = list(range(3, 40, 3))
    kept: list[int] = []
    for step in steps:
        kept.append(step)
        for old in folders.prunable(kept, 2, lambda step: step // 10):
            kept.remove(old)
    assert kept == [12, 21, 30, 36, 39]
    assert folders.prunable([8, 6, 4], 1) == [6, 4]
    assert folders.prunable([4], 1) == []


def test_one_that_got_its_mark_but_not_its_name_is_named(checkpoint: Path) -> None:
    root = checkpoint.parent
    checkpoint.rename(root / "ba3.partial")
    (root / "ba4.partial").mkdir()
    assert folders.newest(root, nobody) is None
    folders.finish_commit(root)
    found = folders.newest(root, nobody)
    assert found is not None
    assert found.step == 3
    checkpoint.rename(root / "ba3.partial")
    (root / "ba3.partial" / "__0_0.distcp").unlink()
    folders.finish_commit(root)
    assert folders.newest(root, nobody) is None, "not whole, whatever its manifest says"


def test_tensors_that_do_not_fit_are_named(checkpoint: Path) -> None:
    reader = Reader(checkpoint)
    with pytest.raises(ValueError, match=r"has no tensor model\.nothing"):
        reader.read({"model.nothing": torch.empty(1)})
    with pytest.raises(ValueError, match=r"model\.lm_head\.weight has shape \(51, 16\), not \(51, 17\)"):
        reader.read({"model.lm_head.weight": torch.empty(51, 17)})


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_weights_in_one_file(model: Dbrx, checkpoint: Path, tmp_path: Path, dtype: torch.dtype) -> None:
    out = tmp_path / "model.safetensors"
    assert consolidate(checkpoint, out, dtype, nobody) == out.stat().st_size
    found, parameters = load_file(out), dict(model.named_parameters())
    assert found.keys() == model.state_dict().keys()
    for name, tensor in model.state_dict().items():
        assert torch.equal(found[name], tensor.to(dtype) if name in parameters else tensor)
    with safe_open(out, "pt") as file:
        assert json.loads(file.metadata()["config"]) == FACTS["config"]
    weights = open_weights(out, nobody)
    again = load_model(weights)
    for name, tensor in again.state_dict().items():
        assert torch.equal(tensor, found[name].float())
    assert weights.config["tokenizer"] == FACTS["config"]["tokenizer"]
    with pytest.raises(ValueError, match="exists already"):
        consolidate(checkpoint, out, dtype, nobody)


def test_a_model_comes_from_a_run_or_a_checkpoint(model: Dbrx, checkpoint: Path) -> None:
    for path in (checkpoint, checkpoint.parent, checkpoint.parent.parent):
        found = load_model(open_weights(path, nobody))
        assert all(torch.equal(t, model.state_dict()[name]) for name, t in found.state_dict().items())


@pytest.mark.parametrize("content", [None, "", "text", "safetensors of another maker"])
def test_what_holds_no_weights_is_refused(tmp_path: Path, content: str | None) -> None:
    path = tmp_path / "there"
    if content is None:
        path.mkdir()
    elif content.startswith("safetensors"):
        from safetensors.torch import save_file

        save_file({"x": torch.zeros(1)}, path)
    else:
        path.write_text(content)
    says = "neither a run with checkpoints nor a checkpoint" if content is None else "not weights that"
    with pytest.raises(ValueError, match=f"there: {says}"):
        load_model(open_weights(path, nobody))


def test_what_is_being_read_is_not_pruned(checkpoint: Path, model: Dbrx) -> None:
    """Neither by the process that reads, nor by another, until that has done."""
    root = checkpoint.parent
    weights = open_weights(root, nobody)
    folders.prune(checkpoint)
    if (child := os.fork()) == 0:
        folders.prune(checkpoint)
        os._exit(0)
    os.waitpid(child, 0)
    again = load_model(weights).state_dict()
    assert all(torch.equal(again[name], tensor) for name, tensor in model.state_dict().items())
    folders.prune(checkpoint)
    assert not checkpoint.exists()
    assert folders.hold(checkpoint) is None
    folders.prune(checkpoint)  # as two may be at it
    with pytest.raises(ValueError, match="neither a run with checkpoints nor a checkpoint nor"):
        open_weights(root, nobody)


def test_a_checkpoint_pruned_before_it_is_held_is_passed_over(
    checkpoint: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    newer, hold = folders.step_folder(checkpoint.parent, 4), folders.hold
    shutil.copytree(checkpoint, newer)

    def late(folder: Path) -> Any:
        if folder == newer and newer.exists():
            folders.prune(newer)
        return hold(folder)

    monkeypatch.setattr(folders, "hold", late)
    load_model(open_weights(checkpoint.parent, nobody))
    (found,) = verify(checkpoint.parent)
    assert found.path == checkpoint


def test_another_vocabulary_than_that_of_the_weights_is_refused(checkpoint: Path, tmp_path: Path) -> None:
    tokenizer = load_tokenizer()
    lines = [b"%s %d" % (base64.b64encode(token), rank) for token, rank in tokenizer.ranks.items()]
    vocabulary = tmp_path / "words.tiktoken"
    vocabulary.write_bytes(b"\n".join(lines))
    config = FACTS["config"] | {"tokenizer": {"name": "words", "vocab_file": str(vocabulary)}}
    files = json.loads((checkpoint / "checkpoint.json").read_text())["files"]
    known = load_tokenizer("words", str(vocabulary)).fingerprint
    folders.commit(checkpoint, FACTS | {"config": config, "files": files, "tokenizer": known})
    consolidate(checkpoint, tmp_path / "one.safetensors", torch.float32, nobody)
    for path in (checkpoint, tmp_path / "one.safetensors"):
        found = tokenizer_of(open_weights(path, nobody))
        assert found is not None
        assert found.fingerprint == known
    exchanged = tmp_path / "exchanged" / "words.tiktoken"
    exchanged.parent.mkdir()
    lines[0], lines[1] = (b"%s %d" % (lines[one].split()[0], rank) for one, rank in ((1, 0), (0, 1)))
    exchanged.write_bytes(b"\n".join(lines))
    config["tokenizer"]["vocab_file"] = str(exchanged)
    folders.commit(checkpoint, FACTS | {"config": config, "files": files, "tokenizer": known})
    (tmp_path / "one.safetensors").unlink()
    consolidate(checkpoint, tmp_path / "one.safetensors", torch.float32, nobody)
    for path in (checkpoint, tmp_path / "one.safetensors"):
        says = f"{exchanged}: is another vocabulary than the one that {re.escape(str(path))} was trained with"
        with pytest.raises(ValueError, match=says):
            tokenizer_of(open_weights(path, nobody))
    run = RunConfig(run_name="x", max_duration="1ba")
    check_tokenizer(run, open_weights(checkpoint, nobody))  # DBRX's, of which it was a copy
    run.tokenizer.name, run.tokenizer.vocab_file = "words", str(exchanged)
    with pytest.raises(ValueError, match=f"tokenizer: {exchanged} is another one than that which"):
        check_tokenizer(run, open_weights(checkpoint, nobody))
