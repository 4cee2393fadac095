"""Data that is killed in the making, damaged, or made by someone with other plans."""

from __future__ import annotations

import itertools
import json
import re
import shutil
import signal
from pathlib import Path
from typing import Any

import pytest
from corpora import WORDS
from streaming import MDSWriter
from streaming.base.format import reader_from_json
from warm import Runs, Warm, equal, flip, truncate

from dbrx_train.data.manifest import check_dataset
from dbrx_train.data.stream.dataset import EvalDataset


def contents(folder: Path) -> dict[str, bytes]:
    return {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


@pytest.mark.slow
def test_preparation_killed_at_every_operation_ends_with_the_same_bytes(warm: Warm, tmp_path: Path) -> None:
    text, words = tmp_path / "text.jsonl", itertools.cycle(WORDS)
    documents = (" ".join(itertools.islice(words, 900 + i % 7)) for i in range(300))
    text.write_text("\n".join(json.dumps({"text": document}) for document in documents))

    def prepare(name: str, **fault: object) -> tuple[int, str]:
        command = ["data", "prepare", str(text), "--out", str(tmp_path / name), "--seq-len", "32"]
        faults = [{"root": str(tmp_path / name), **fault}] if fault else []
        return warm(*command, "--processes", "1", "--val-fraction", "0.2", faults=faults)

    trace = tmp_path / "operations"
    assert prepare("whole", kind="trace", out=str(trace))[0] == 0
    operations = list(dict.fromkeys(trace.read_text().splitlines()))
    assert any("part-00001" in line for line in operations), "more than one part"
    # The second part is as the first; of leases, tests/test_lease.py says what a kill leaves
    for at in (
        line for line in operations if "00001" not in line and not re.search(r"\.lease|1\.json", line)
    ):
        code, said = prepare("killed", kind="kill", at=at)
        assert code == -signal.SIGKILL, (at, said)
    code, said = prepare("killed")
    assert code == 0, said
    assert contents(tmp_path / "killed") == contents(tmp_path / "whole")


@pytest.mark.slow
def test_damaged_data_is_one_line_that_names_it_or_is_mended(
    runs: Runs, workplace: Path, tmp_path: Path
) -> None:
    web, run = tmp_path / "web", [f"data.sources.web.local={tmp_path}/web"]

    def restore() -> None:
        shutil.rmtree(web, ignore_errors=True)
        shutil.copytree(workplace / "web", web, ignore=shutil.ignore_patterns("*.mds"))

    restore()
    (packed,) = (path.relative_to(web) for path in (web / "train").rglob("*.zstd"))
    for harm, name in itertools.product((flip, truncate), ("manifest.json", "train/index.json", str(packed))):
        restore()
        harm(web / name)
        code, said = runs("bad-data", *run)
        assert code == 2, said
        (line,) = (line for line in said.splitlines() if line.startswith("dbrx-train: "))
        assert Path(name).name in line
        assert "Traceback" not in said
    restore()
    unpacked, good = web / packed.with_suffix(""), list[bytes]()
    for name, harm in (("unpacked", None), ("mended", flip), ("mended-too", truncate)):
        if harm is not None:
            harm(unpacked)
        code, said = runs(name, *run)
        assert code == 0, said
        assert equal(runs.final(name), runs.final("whole"))
        good.append(unpacked.read_bytes())
    assert good[0] == good[1] == good[2]


@pytest.mark.slow
def test_a_damaged_configuration_is_one_line(runs: Runs, tmp_path: Path) -> None:
    text, path = runs.yaml.read_text(), tmp_path / "run.yaml"
    for damaged, says in (
        (text.replace("optimization", "optimizatiog"), f"{path}: unknown key optimizatiog; did you mean"),
        (text[: text.index("d_model") + 4], f"{path}, line "),
        (text.replace("ffn_hidden_size: 14", "ffn_hidden_size: 15"), "ffn_hidden_size: 15 here, but"),
    ):
        path.write_text(damaged)
        code, said = runs.warm("train", str(path), "run_name=whole", f"folder={runs.folder('whole')}")
        assert code == 2, said
        (line,) = (line for line in said.splitlines() if line.startswith("dbrx-train: "))
        assert says in line


class Malicious:
    """Leaves a file behind when it is unpickled."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self) -> Any:
        return Path.touch, (self.path,)


def shards(folder: Path, columns: dict[str, str], sample: dict[str, Any]) -> Path:
    with MDSWriter(out=str(folder / "val"), columns=columns, hashes=["xxh64"]) as writer:
        writer.write(sample)
    return folder / "val" / "index.json"


def test_a_shard_that_would_be_unpickled_is_refused(tmp_path: Path) -> None:
    ran = tmp_path / "ran"
    index = shards(tmp_path / "data", {"tokens": "pkl"}, {"tokens": Malicious(ran)})
    says = r"val/index.json: column tokens is stored as pkl, which to read may run code; must be"
    with pytest.raises(ValueError, match=says):
        _ = EvalDataset(str(tmp_path / "data"), seq_len=8)[0]
    assert not ran.exists()
    _ = reader_from_json(str(index.parent), None, json.loads(index.read_text())["shards"][0])[0]
    assert ran.exists(), "it would have run"


@pytest.mark.parametrize("name", ["../stolen.mds", "/tmp/stolen.mds", "a/../../stolen.mds"])
def test_an_index_cannot_leave_its_folder(tmp_path: Path, workplace: Path, name: str) -> None:
    shutil.copytree(workplace / "web", tmp_path / "web")
    path = tmp_path / "web" / "val" / "index.json"
    index = json.loads(path.read_text())
    shutil.copy(path.parent / index["shards"][0]["zip_data"]["basename"], tmp_path / "web" / "stolen.mds")
    for form in ("raw_data", "zip_data"):
        index["shards"][0][form]["basename"] = name
    path.write_text(json.dumps(index))
    says = rf"index.json: names '{name}'; must name files in its folder alone"
    with pytest.raises(ValueError, match=says):
        check_dataset(tmp_path / "web", 32, split="val")
    with pytest.raises(ValueError, match=says):
        _ = EvalDataset(str(tmp_path / "web"), seq_len=32)[0]
