"""Runs that begin with weights from elsewhere and give theirs away while they go on."""

from __future__ import annotations

import base64
import threading
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import pytest
import torch
from tiny_run import run_yaml, saved_tensors
from warm import Warm

from dbrx_train.checkpoint import folder as folders
from dbrx_train.checkpoint.huggingface import export
from dbrx_train.checkpoint.verify import verify
from dbrx_train.checkpoint.weights import load_model, open_weights
from dbrx_train.config import ConfigError, load
from dbrx_train.data.tokenizer import load_tokenizer
from dbrx_train.train import exports
from dbrx_train.train.resume import same_tokenizer
from dbrx_train.train.run import run

transformers = pytest.importorskip("transformers")

QUICK = ["evaluation.max_samples=0", "data.mix=[{at: 0tok, weights: {web: 1, code: 1}}]"]
QUICK += ["optimization.learning_rate.schedule=constant"]
STILL = ["max_duration=1ba", "optimization.optimizer.lr=1e-30"]


@pytest.fixture
def in_tmp(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.chdir(tmp_path)
    return tmp_path


def nobody(line: str) -> None:
    raise AssertionError(line)


def models(checkpoint: Path) -> dict[str, torch.Tensor]:
    return {name: tensor for name, tensor in saved_tensors(checkpoint).items() if name.startswith("model.")}


def assert_equal(one: dict[str, torch.Tensor], other: dict[str, torch.Tensor]) -> None:
    assert one.keys() == other.keys()
    assert [name for name in one if not torch.equal(one[name], other[name])] == []


@pytest.mark.slow
def test_a_run_exports_beside_training_and_another_begins_from_that(
    workplace: Path, in_tmp: Path, monkeypatch: pytest.MonkeyPatch, warm: Warm
) -> None:
    written = list[tuple[str, bool]]()

    def late(checkpoint: Path, *rest: Any) -> int:
        if checkpoint.name == "ba3":
            saved.wait(60)  # until training has saved twice more, and would have pruned it
        written.append((checkpoint.name, threading.current_thread() is threading.main_thread()))
        return export(checkpoint, *rest)

    saved = threading.Event()
    commit = folders.commit

    def seen(folder: Path, facts: dict[str, Any]) -> None:
        commit(folder, facts)
        if folder.stem == "ba7":
            saved.set()

    monkeypatch.setattr(exports, "export", late)
    monkeypatch.setattr(folders, "commit", seen)
    options = ["checkpoints.interval=7ba", "checkpoints.export={interval: 3ba, dtype: float32}"]
    run(load(run_yaml(workplace, in_tmp, "base"), [*QUICK, *options, "checkpoints.keep=1"]))
    assert written == [("ba3", False), ("ba6", False), ("ba8", False)]
    root = in_tmp / "base" / "exports"
    assert sorted(path.name for path in root.iterdir()) == ["ba3", "ba6", "ba8"]
    last = in_tmp / "base" / "checkpoints" / "ba8"
    ours = load_model(open_weights(last, nobody))
    theirs = transformers.AutoModelForCausalLM.from_pretrained(root / "ba8")
    words = transformers.AutoTokenizer.from_pretrained(root / "ba8")("The model reads a token.")
    ids = torch.tensor([words["input_ids"]])
    with torch.no_grad():
        torch.testing.assert_close(theirs(ids).logits, ours.eval()(ids).logits, rtol=1e-5, atol=1e-6)
    assert verify(root / "ba8")[0].hashed
    assert verify(in_tmp / "base")[0].hashed

    source = f"init_from.path={root}/ba8"
    path = run_yaml(workplace, in_tmp, "next")
    warm.torchrun(2, "-m", "dbrx_train", "train", str(path), *QUICK, *STILL, source)
    assert_equal(models(in_tmp / "next" / "checkpoints" / "ba1"), models(last))
    path = run_yaml(workplace, in_tmp, "wrong")
    for change, says in (
        ("model.vocab_size=513", r"model.vocab_size: 513 here, but .*/ba8 was saved with 512"),
        ("model.num_experts=4", "model.num_experts: 4 here, but .*/ba8 was saved with 16"),
        ("model.norm=rmsnorm", "model.norm: rmsnorm here, but .*/ba8 was saved with layernorm"),
        ("init_from.upcycle=true", "init_from.upcycle: .*/ba8: has 16 experts a layer already"),
        ("checkpoints.export.dtype=fp8", "checkpoints.export.dtype: 'fp8' is not one of bfloat16, float32"),
    ):
        with pytest.raises(ConfigError, match=says):
            run(load(path, [*QUICK, *STILL, source, change]))
    bias = ["checkpoints.export.interval=1ba", "model.loss_free_bias_rate=0.1"]
    with pytest.raises(
        ConfigError, match=r"checkpoints.export: model.loss_free_bias_rate: DbrxForCausalLM has"
    ):
        run(load(path, [*QUICK, *STILL, *bias]))
    with pytest.warns(UserWarning, match=r"model.rope_theta: 10.0 here, but 500000.0 in .*/ba8"):
        run(load(run_yaml(workplace, in_tmp, "far"), [*QUICK, *STILL, source, "model.rope_theta=10"]))


def test_a_tokenizer_is_told_by_its_vocabulary_not_by_its_file(tmp_path: Path) -> None:
    usual = {"name": "cl100k_base", "vocab_file": None}
    lines = (b"%s %d\n" % (base64.b64encode(token), rank) for token, rank in load_tokenizer().ranks.items())
    (tmp_path / "same").write_bytes(b"".join(lines))
    assert same_tokenizer(usual, usual | {"vocab_file": str(tmp_path / "same")})
    assert not same_tokenizer(usual, usual | {"vocab_file": str(tmp_path / "gone")})
    assert not same_tokenizer(usual, None)


@pytest.mark.parametrize("trouble", [None, RuntimeError("No space left")])
def test_an_export_takes_the_place_of_another_only_when_it_is_whole(
    trouble: Exception | None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def made(checkpoint: Path, out: Path, *rest: Any) -> int:
        out.mkdir()
        assert (tmp_path / "ba3" / "old").exists()
        if trouble:
            raise trouble
        return 0

    for name in ("ba3/old", "ba2.partial/torn"):
        (tmp_path / name).mkdir(parents=True)
    monkeypatch.setattr(exports, "export", made)
    writer = exports.Exports(tmp_path, "1ba", torch.float32)
    assert [path.name for path in tmp_path.iterdir()] == ["ba3"]
    with pytest.warns(UserWarning, match="could not be written") if trouble else nullcontext():
        writer.begin(tmp_path / "elsewhere" / "ba3")
        writer.wait()
    assert (tmp_path / "ba3" / "old").exists() == bool(trouble)
    assert [path.name for path in exports.Exports(tmp_path, "1ba", torch.float32).root.iterdir()] == ["ba3"]


@pytest.mark.slow
@pytest.mark.parametrize("trouble", [OSError(28, "No space left on device"), RuntimeError("No space")])
def test_an_export_that_fails_does_not_end_the_run(
    trouble: Exception, workplace: Path, in_tmp: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def full(*rest: Any) -> int:
        raise trouble

    monkeypatch.setattr(exports, "export", full)
    options = ["checkpoints.export.interval=4ba"]
    with pytest.warns(
        UserWarning, match=r"checkpoints.export: .*/exports/ba4 could not be written .*No space"
    ):
        run(load(run_yaml(workplace, in_tmp, "full"), [*QUICK, *options]))
    assert folders.saved(in_tmp / "full" / "checkpoints")[0].name == "ba8"


@pytest.mark.slow
def test_a_dense_run_is_upcycled(workplace: Path, in_tmp: Path, warm: Warm) -> None:
    dense = ["model.num_experts=1", "model.top_k=1"]
    run(load(run_yaml(workplace, in_tmp, "dense"), [*QUICK, *dense, "max_duration=2ba"]))
    before = load_model(open_weights(in_tmp / "dense", nobody))
    options = [
        *QUICK,
        *STILL,
        "init_from={path: dense, upcycle: true}",
        "model.num_experts=4",
        "model.top_k=2",
    ]
    run(load(run_yaml(workplace, in_tmp, "one"), options))
    path = run_yaml(workplace, in_tmp, "two")
    warm.torchrun(2, "-m", "dbrx_train", "train", str(path), *options, "parallelism.expert=2")
    assert_equal(
        models(in_tmp / "one" / "checkpoints" / "ba1"), models(in_tmp / "two" / "checkpoints" / "ba1")
    )
    after = load_model(open_weights(in_tmp / "one", nobody))
    ids = torch.randint(512, (2, 30), generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        torch.testing.assert_close(after.eval()(ids).logits, before.eval()(ids).logits, rtol=1e-5, atol=1e-6)
