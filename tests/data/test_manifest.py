"""Folders that hold no prepared data are called what they are."""

from __future__ import annotations

from pathlib import Path

import pytest

from dbrx_train.data.manifest import WORK, read_manifest


@pytest.mark.parametrize(
    ("name", "says"),
    [
        (None, r"data: empty, it has no manifest\.json"),
        (f"{WORK}/plan.json", r"data: half written, it has no manifest\.json"),
        ("train/index.json", r"data: half written, it has no manifest\.json"),
        ("a.txt", r"data: holds no prepared data, but a\.txt; make some of it with `dbrx-train data prepare"),
    ],
)
def test_a_folder_without_a_manifest_is_called_what_it_is(
    tmp_path: Path, name: str | None, says: str
) -> None:
    folder = tmp_path / "data"
    folder.mkdir()
    if name is not None:
        (folder / name).parent.mkdir(exist_ok=True)
        (folder / name).write_text("x")
    with pytest.raises(ValueError, match=says):
        read_manifest(folder)
