"""Where a fraction is asked for, documents enough for a sample are held out, the same ones after any kill."""

from __future__ import annotations

from pathlib import Path

import pytest
from corpora import words, write_corpus

from dbrx_train.config.sections import SourceConfig
from dbrx_train.data.inspect import inspect
from dbrx_train.data.manifest import check_held_out
from dbrx_train.data.prepare import pipeline
from dbrx_train.data.prepare.pipeline import Summary, prepare
from dbrx_train.data.stream.held_out import held_out_samples
from dbrx_train.data.tokenizer import load_tokenizer


@pytest.fixture(scope="module")
def text(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Six documents of 20 to 90 words, and the vocabulary ``words.tiktoken`` beside."""
    root = tmp_path_factory.mktemp("few")
    words(root)
    return write_corpus(root / "text", 3, documents=6)


def prepared(text: Path, out: Path, **options: object) -> Summary:
    given = {"seq_len": 64, "processes": 1, "vocab_file": str(text.parent / "words.tiktoken"), **options}
    return prepare([str(text)], str(out), **given)  # type: ignore[arg-type]


def files(folder: Path) -> dict[str, bytes]:
    return {str(p.relative_to(folder)): p.read_bytes() for p in sorted(folder.rglob("*")) if p.is_file()}


def test_few_documents_hold_out_a_sample_and_a_killed_preparation_the_same(
    text: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("dbrx_train.data.prepare.sources.MIN_PART_BYTES", 1)
    monkeypatch.setattr("dbrx_train.data.prepare.sources.MAX_PART_BYTES", 1)
    whole = prepared(text, tmp_path / "whole", val_fraction=1e-9).manifest
    train, val = whole.splits["train"], whole.splits["val"]
    assert val.samples >= 1
    assert train.documents + val.documents == 6
    assert 1 <= val.documents <= 2
    done, real = [], pipeline.run_part

    def failing(*arguments: object) -> None:
        real(*arguments)  # type: ignore[arg-type]
        done.append(arguments)
        if arguments[0].val_fraction > 1e-9:  # type: ignore[attr-defined]
            raise KeyboardInterrupt

    monkeypatch.setattr(pipeline, "run_part", failing)
    with pytest.raises(KeyboardInterrupt):
        prepared(text, tmp_path / "killed", val_fraction=1e-9)
    monkeypatch.setattr(pipeline, "run_part", real)
    prepared(text, tmp_path / "killed", val_fraction=1e-9)
    assert files(tmp_path / "killed") == files(tmp_path / "whole")


def test_what_is_too_little_for_both_is_trained_on(text: Path, tmp_path: Path) -> None:
    alone = tmp_path / "alone"
    alone.mkdir()
    (alone / "a.txt").write_text((text / "000.txt").read_text())
    (alone.parent / "words.tiktoken").write_bytes((text.parent / "words.tiktoken").read_bytes())
    summary = prepared(alone, tmp_path / "one", val_fraction=1e-9, seq_len=16)
    assert [*summary.manifest.splits] == ["train"]
    assert "val: nothing" in str(summary)


def test_a_folder_of_ones_own_takes_the_place_of_what_is_held_out(text: Path, tmp_path: Path) -> None:
    own, local = tmp_path / "own", tmp_path / "local"
    assert [*prepared(text, own, val_fraction=1).manifest.splits] == ["val"]
    assert "of val" in inspect(own, vocab_file=str(text.parent / "words.tiktoken"))
    prepared(text, local, val_fraction=0)
    tokenizer = load_tokenizer(vocab_file=str(text.parent / "words.tiktoken"))
    sources = {"web": SourceConfig(str(local), val=str(own))}
    (part,) = held_out_samples(sources, {"web": 64}, tokenizer, 512, 1000)
    assert part.samples == prepared(text, own, val_fraction=1).manifest.splits["val"].samples > 1
    with pytest.raises(ValueError, match=rf"^val: {local} holds data to train on, too; prepare what is held"):
        check_held_out(str(local), 64, tokenizer.fingerprint, 512)
