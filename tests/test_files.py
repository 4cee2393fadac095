"""Files are written whole, where the user said, or not at all."""

from __future__ import annotations

import errno
import os
import stat
from pathlib import Path

import pytest

from dbrx_train.files import atomic_write, naming_file
from dbrx_train.lease import new_folder


def write_half(path: Path, error: BaseException) -> None:
    with atomic_write(path) as partial:
        partial.write_text("half")
        raise error


def test_a_file_takes_its_place_once_it_is_whole(tmp_path: Path) -> None:
    path = tmp_path / "page.html"
    path.write_text("before")
    with atomic_write(path) as partial:
        partial.write_text("after")
        assert path.read_text() == "before"
        assert partial.suffix == ".html"
    assert path.read_text() == "after"
    with pytest.raises(OSError, match="No space") as caught:
        write_half(path, OSError(errno.ENOSPC, os.strerror(errno.ENOSPC)))
    assert caught.value.filename == str(path)
    with pytest.raises(FileNotFoundError) as missing, atomic_write(tmp_path / "no" / "page") as partial:
        partial.write_text("nowhere")
    assert missing.value.filename == str(tmp_path / "no" / "page")
    with pytest.raises(KeyboardInterrupt):
        write_half(path, KeyboardInterrupt())
    assert [file.name for file in tmp_path.iterdir()] == ["page.html"]
    assert path.read_text() == "after"


def test_a_link_stays_one_and_what_is_no_plain_file_is_written_as_it_is(tmp_path: Path) -> None:
    target, link, pipe = tmp_path / "target", tmp_path / "link", tmp_path / "pipe"
    target.write_text("before")
    link.symlink_to(target)
    with atomic_write(link) as partial:
        partial.write_text("after")
    assert link.is_symlink()
    assert target.read_text() == "after"
    os.mkfifo(pipe)
    reader = os.open(pipe, os.O_RDONLY | os.O_NONBLOCK)
    with atomic_write(pipe) as partial:
        partial.write_text("through")
    assert os.read(reader, 100) == b"through"
    os.close(reader)
    assert stat.S_ISFIFO(pipe.stat().st_mode)


def test_an_error_without_a_name_gets_one_and_others_keep_theirs(tmp_path: Path) -> None:
    for given, wanted in ((None, "mine"), ("theirs", "theirs")):
        with pytest.raises(OSError, match="x") as caught, naming_file("mine"):
            raise OSError(1, "x", given)
        assert caught.value.filename == wanted


def test_a_folder_is_there_when_it_is_whole(tmp_path: Path) -> None:
    out = tmp_path / "out"
    with pytest.raises(FileNotFoundError), new_folder(out) as partial:
        (partial / "no" / "file").touch()
    assert [*tmp_path.iterdir()] == []
    with new_folder(out) as partial:
        (partial / "file").touch()
    assert (out / "file").exists()
    with pytest.raises(ValueError, match="out: exists already"), new_folder(out):
        pass
