from __future__ import annotations

import json
from importlib import metadata
from pathlib import Path

import pytest

from dbrx_train.data.manifest import check_dataset
from dbrx_train.data.prepare import quickstart
from dbrx_train.data.prepare.quickstart import prepare_quickstart


def files(folder: Path) -> dict[str, bytes]:
    return {str(p.relative_to(folder)): p.read_bytes() for p in sorted(folder.rglob("*")) if p.is_file()}


def origins(folder: Path, name: str) -> list[str]:
    with open(folder / "text" / f"{name}.jsonl", encoding="utf-8") as lines:
        return [json.loads(line)["origin"] for line in lines]


@pytest.mark.slow
def test_the_corpus_of_any_python(tmp_path: Path) -> None:
    summaries = prepare_quickstart(str(tmp_path / "a"), progress=False)
    assert list(summaries) == ["code", "prose"]
    for name, summary in summaries.items():
        manifest = check_dataset(tmp_path / "a" / name, 512)
        check_dataset(tmp_path / "a" / name, 512, split="val")
        assert manifest.splits["train"].tokens > 300_000
        assert manifest.splits["val"].samples >= 4
        assert not summary.already_done
    assert "argparse.py" in origins(tmp_path / "a", "code")
    skipped = {"test", "tests", "site-packages", "encodings"}
    assert not [path for path in origins(tmp_path / "a", "code") if skipped & set(path.split("/"))]
    prose = origins(tmp_path / "a", "prose")
    assert {"docstrings of argparse.py", "pydoc topic assert"} <= set(prose)

    again = prepare_quickstart(str(tmp_path / "a"), progress=False)
    assert all(summary.already_done for summary in again.values())


def small_library(folder: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A standard library of two modules, so that a test takes no time."""
    for name in ("one.py", "sub/two.py", "test/three.py"):
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        doc = f"What {name} does, at some length, so that there is something to read. " * 20
        (folder / name).write_text(f'"""{doc}"""\n\n\ndef f():\n    """{doc[::-1]}"""\n    return 1\n')
    (folder / "latin.py").write_bytes(b"# caf\xe9\n" * 100)
    (folder / "broken.py").write_text("def (:\n" * 50)
    monkeypatch.setattr(quickstart.sysconfig, "get_path", lambda _: str(folder))
    return folder


def test_the_same_python_gives_the_same_bytes(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    small_library(tmp_path / "lib", monkeypatch)
    monkeypatch.setattr(metadata, "distributions", list)
    options = {"seq_len": 16, "val_fraction": 0.3, "progress": False}
    prepare_quickstart(str(tmp_path / "a"), processes=1, **options)  # type: ignore[arg-type]
    prepare_quickstart(str(tmp_path / "b"), processes=2, **options)  # type: ignore[arg-type]
    a, b = files(tmp_path / "a"), files(tmp_path / "b")
    assert a.keys() == b.keys()
    # A manifest names its sources by path and time, documents.npz and inputs.jsonl the files
    named = ("/documents.npz", "/inputs.jsonl")
    other = {name for name in a if a[name] != b[name] and not name.endswith(named)}
    assert other == {"code/manifest.json", "prose/manifest.json"}
    assert origins(tmp_path / "a", "code") == ["broken.py", "one.py", "sub/two.py"]


def test_text_once_gathered_stays(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    library = small_library(tmp_path / "lib", monkeypatch)
    monkeypatch.setattr(metadata, "distributions", list)
    prepare_quickstart(str(tmp_path / "a"), seq_len=16, processes=1)
    (library / "new.py").write_text("# new\n" * 100)
    again = prepare_quickstart(str(tmp_path / "a"), seq_len=16, processes=1)
    assert all(summary.already_done for summary in again.values())


def test_missing_parts_are_done_without(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    small_library(tmp_path / "lib", monkeypatch)
    monkeypatch.setitem(__import__("sys").modules, "pydoc_data.topics", None)
    monkeypatch.setattr(metadata, "distributions", list)
    prepare_quickstart(str(tmp_path / "a"), seq_len=16, processes=1)
    assert origins(tmp_path / "a", "prose") == ["docstrings of one.py", "docstrings of sub/two.py"]


def test_a_python_without_sources_is_told_so(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "lib").mkdir()
    monkeypatch.setattr(quickstart.sysconfig, "get_path", lambda _: str(tmp_path / "lib"))
    with pytest.raises(ValueError, match=r"lib: holds no source of the standard library"):
        prepare_quickstart(str(tmp_path / "a"))
