"""The lease of a place on an object store, and of folders that are being made: one holder at a time."""

from __future__ import annotations

import json
import os
import shutil
import threading
import time
from pathlib import Path

import pytest

from dbrx_train import lease as leases
from dbrx_train.checkpoint import remote_lease
from dbrx_train.checkpoint.remote_lease import NAME, RemoteLease
from dbrx_train.data.prepare.pipeline import prepare
from dbrx_train.lease import Lease, LeaseHeld, LeaseLost, new_folder

FAR = {"host": "far", "pid": 7, "job": "pod x", "since": 0, "machine": "x", "started": "1", "token": "far"}


class Folder:
    """An object store that is a folder."""

    def __init__(self, root: Path) -> None:
        self.root, self.reachable = root, True

    def _path(self, name: str) -> Path:
        if not self.reachable:
            raise RuntimeError("no route to the store")
        return self.root / name.replace("/", "_")

    def upload_object(self, object_name: str, filename: str) -> None:
        shutil.copy(filename, self._path(object_name))

    def download_object(self, object_name: str, filename: str, overwrite: bool = False) -> None:
        shutil.copy(self._path(object_name), filename)

    def list_objects(self, prefix: str | None = None) -> list[str]:
        raise NotImplementedError


@pytest.fixture
def store(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Folder:
    monkeypatch.setattr(remote_lease, "RENEW_SECONDS", 0.1)
    monkeypatch.setattr(remote_lease, "STALE_SECONDS", 1.0)
    monkeypatch.setattr(remote_lease, "SETTLE_SECONDS", 0.2)
    return Folder(tmp_path)


def claim(store: Folder, said: list[str] | None = None) -> RemoteLease:
    told: list[str] = [] if said is None else said
    return RemoteLease(store, "run", "s3://bucket/run", lost=told.append, say=told.append)


def written(store: Folder, **values: object) -> None:
    (store.root / f"run_{NAME}").write_text(json.dumps(FAR | values))


def test_a_living_holder_of_a_store_is_named_and_a_released_place_is_free(store: Folder) -> None:
    with claim(store):
        says = rf"^s3://bucket/run: is in use by process {os.getpid()} on \S+, since .* UTC; wait for it, or"
        with pytest.raises(LeaseHeld, match=says), claim(store):
            pass
    said: list[str] = []
    with claim(store, said):
        assert said == []


def test_a_holder_elsewhere_lives_as_long_as_it_counts_up(store: Folder) -> None:
    over = threading.Event()

    def renew() -> None:
        count = 0
        while not over.wait(0.1):
            count += 1
            written(store, count=count)

    thread = threading.Thread(target=renew)
    thread.start()
    written(store)
    said: list[str] = []
    with pytest.raises(LeaseHeld, match="in use by process 7 on far, pod x, since 1970"), claim(store, said):
        pass
    over.set()
    thread.join()
    with claim(store, said):
        assert "waiting up to 1 s to see if process 7 on far, pod x" in said[-1]


def test_a_dead_holder_of_this_machine_is_succeeded_at_once(store: Folder) -> None:
    if (child := os.fork()) == 0:
        claim(store).__enter__()
        os._exit(0)
    os.waitpid(child, 0)
    said: list[str] = []
    with claim(store, said):
        assert said == []


def test_a_holder_finds_its_successor_and_outlives_a_store_out_of_reach(store: Folder) -> None:
    said: list[str] = []
    with claim(store, said) as ours:
        store.reachable = False
        ours.check()
        time.sleep(0.3)
        assert said == []
        store.reachable = True
        written(store)
        with pytest.raises(LeaseLost, match="lost s3://bucket/run to process 7 on far"):
            ours.check()
        deadline = time.monotonic() + 10
        while not said and time.monotonic() < deadline:
            time.sleep(0.02)
    assert said == ["lost s3://bucket/run to process 7 on far, pod x, since 1970-01-01 00:00:00 UTC"]
    assert "released" not in json.loads((store.root / f"run_{NAME}").read_text())


def test_of_two_that_write_together_the_last_holds(store: Folder, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(remote_lease.time, "sleep", lambda _: written(store))
    with pytest.raises(LeaseHeld, match="in use by process 7 on far"), claim(store):
        pass


def test_a_folder_that_is_being_made_is_refused_with_who_makes_it(tmp_path: Path) -> None:
    out, partial = tmp_path / "out", tmp_path / "out.partial"
    with new_folder(out) as folder:
        (folder / "weights").touch()
        says = rf"out.partial: is in use by process {os.getpid()} on"
        with pytest.raises(LeaseHeld, match=says), new_folder(out):
            pass
        assert (folder / "weights").exists()
    assert [path.name for path in out.iterdir()] == ["weights"]
    assert not partial.exists()
    with (
        pytest.raises(ValueError, match="out: exists already; choose another"),
        new_folder(out),
    ):
        pass


def test_what_a_killed_process_left_of_a_folder_is_made_anew(tmp_path: Path) -> None:
    out = tmp_path / "out"
    if (child := os.fork()) == 0:
        with new_folder(out) as folder:
            (folder / "torn").touch()
            os._exit(0)
    os.waitpid(child, 0)
    assert (tmp_path / "out.partial" / "out" / "torn").exists()
    with new_folder(out):
        pass
    assert [*out.iterdir()] == []


def test_a_preparation_that_is_under_way_is_refused_with_who_does_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(leases, "RENEW_SECONDS", 0.1)
    (tmp_path / "text.txt").write_text("the model reads a token " * 99)
    arguments = ([str(tmp_path / "text.txt")], str(tmp_path / "out"))
    with (
        Lease(tmp_path / "out", lost=pytest.fail, say=pytest.fail),
        pytest.raises(ValueError, match=rf"out: is in use by process {os.getpid()} on"),
    ):
        prepare(*arguments, seq_len=16, processes=1, progress=False)
    prepare(*arguments, seq_len=16, processes=1, progress=False)
    assert ".lease" not in {path.name for path in (tmp_path / "out").iterdir()}
