"""A manifest names its raw files, their curation, and what may be done with them."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import xxhash
from corpora import write_corpus

from dbrx_train.data.governance import Governance
from dbrx_train.data.inputs import curation_report, read_inputs
from dbrx_train.data.inspect import inspect
from dbrx_train.data.manifest import read_manifest
from dbrx_train.data.prepare.pipeline import Summary, prepare


def prepared(source: Path, out: Path, governance: Governance | None = None) -> Summary:
    return prepare(
        [str(source)],
        str(out),
        seq_len=32,
        processes=1,
        progress=False,
        val_fraction=0.2,
        governance=governance,
    )


def test_a_manifest_names_every_raw_file(tmp_path: Path) -> None:
    source = write_corpus(tmp_path / "in", seed=0)
    prepared(source, tmp_path / "out")
    manifest = read_manifest(tmp_path / "out")
    assert manifest.inputs is not None
    files = list(read_inputs(tmp_path / "out", manifest.inputs))
    assert [each.path for each in files] == [str(path) for path in sorted(source.iterdir())]
    for each in files:
        content = Path(each.path).read_bytes()
        assert (each.bytes, each.xxh3) == (len(content), xxhash.xxh3_128_hexdigest(content))
    assert (manifest.inputs.files, manifest.inputs.bytes) == (len(files), sum(each.bytes for each in files))
    listing = tmp_path / "out" / "inputs.jsonl"
    listing.write_text(listing.read_text().replace("000.txt", "999.txt"))
    with pytest.raises(ValueError, match=r"inputs\.jsonl: damaged"):
        list(read_inputs(tmp_path / "out", manifest.inputs))


def test_a_manifest_names_the_curation_beside_its_inputs(tmp_path: Path) -> None:
    source = write_corpus(tmp_path / "in", seed=0)
    report = source / "curation.json"
    report.write_text(json.dumps({"recipe_digest": "abc", "inputs": ["raw.jsonl"]}))
    digest = xxhash.xxh3_128_hexdigest(report.read_bytes())
    prepared(source / "000.txt", tmp_path / "one")
    prepared(source, tmp_path / "all")
    report.unlink()  # a copy is kept
    for out in (tmp_path / "one", tmp_path / "all"):
        (curation,) = read_manifest(out).curation
        assert (curation.path, curation.xxh3, curation.recipe) == (str(report), digest, "abc")
        assert curation_report(out, curation)["inputs"] == ["raw.jsonl"]
    assert f"curated: {report}, recipe abc" in inspect(tmp_path / "all")
    report.write_text("[]")
    with pytest.raises(ValueError, match=r"curation\.json: no report of a curation"):
        prepared(source, tmp_path / "bad")


def test_terms_are_kept_and_may_be_changed_without_preparing_again(tmp_path: Path) -> None:
    source = write_corpus(tmp_path / "in", seed=0)
    prepared(source, tmp_path / "out", Governance("MIT", "us", allowed=["train"]))
    index = (tmp_path / "out" / "train" / "index.json").stat().st_mtime_ns
    again = prepared(source, tmp_path / "out", Governance("CC0-1.0"))
    assert again.already_done
    assert read_manifest(tmp_path / "out").governance == Governance("CC0-1.0", "us", allowed=["train"])
    assert "licence CC0-1.0, owner us, allowed: train" in str(again)
    assert "licence CC0-1.0" in inspect(tmp_path / "out")
    assert (tmp_path / "out" / "train" / "index.json").stat().st_mtime_ns == index
    assert prepared(source, tmp_path / "out").manifest == again.manifest, "what is not given stays"
    with pytest.raises(ValueError, match="allowed: 'sell' is no use; must be train or eval"):
        Governance(allowed=["sell"])
