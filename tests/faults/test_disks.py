"""Disks that are full, and a tracking server that is out of reach."""

from __future__ import annotations

import shutil
import socket
import subprocess
import threading
import time
from collections.abc import Iterator
from pathlib import Path

import mlflow
import pytest
from fault_runs import fill_up
from warm import STEPS, Runs, Warm, equal

from dbrx_train.checkpoint import folder as folders


class Disk:
    """A small file system of its own."""

    def __init__(self, path: Path) -> None:
        self.path = path
        path.mkdir()

    def resize(self, kilobytes: int, how: str = "remount,") -> None:
        command = ["mount", "-t", "tmpfs", "-o", f"{how}size={kilobytes}k", "tmpfs", str(self.path)]
        subprocess.run(command, check=True, capture_output=True, timeout=20)


@pytest.fixture
def disk(tmp_path: Path) -> Iterator[Disk]:
    made = Disk(tmp_path / "disk")
    try:
        made.resize(1024, how="")
    except (OSError, subprocess.CalledProcessError):
        pytest.skip("this user may not mount a file system")
    yield made
    subprocess.run(["umount", "--lazy", str(made.path)], check=True, timeout=20)


def last(said: str) -> str:
    return said.strip().splitlines()[-1]


def test_preparation_on_a_full_disk_is_one_line_and_goes_on_when_there_is_room(
    warm: Warm, workplace: Path, disk: Disk, tmp_path: Path
) -> None:
    def prepare(out: Path) -> tuple[int, str]:
        command = ["data", "prepare", str(workplace / "text" / "web"), "--out", str(out)]
        return warm(*command, "--seq-len", "32", "--val-fraction", "0.2", "--processes", "1")

    disk.resize(8)
    code, said = prepare(disk.path / "out")
    assert code == 2, said
    line, *_ = said.splitlines()
    assert line.startswith(f"dbrx-train: {disk.path}/out")
    assert line.endswith("No space left on device")
    assert "Traceback" not in said
    disk.resize(1024)
    code, said = prepare(disk.path / "out")
    assert code == 0, said
    assert prepare(tmp_path / "whole")[0] == 0
    for path in (tmp_path / "whole").rglob("*"):
        if path.is_file():
            assert (
                disk.path / "out" / path.relative_to(tmp_path / "whole")
            ).read_bytes() == path.read_bytes()


@pytest.mark.slow
def test_a_page_or_a_picture_on_a_full_disk_is_one_line(runs: Runs, warm: Warm, disk: Disk) -> None:
    disk.resize(8)
    page, picture = disk.path / "page.html", disk.path / "mix.png"
    for command, file in (
        (("report", str(runs.folder("whole")), "--out", str(page)), page),
        (("data", "mix", str(runs.yaml), "--picture", str(picture)), picture),
    ):
        code, said = warm(*command)
        assert code == 2, said
        assert last(said) == f"dbrx-train: {file}: No space left on device"
        assert "Traceback" not in said
    assert [*disk.path.iterdir()] == []


@pytest.mark.slow
def test_a_checkpoint_on_a_full_disk_is_one_line_and_loses_nothing_saved(runs: Runs, disk: Disk) -> None:
    pages = (-(-file.stat().st_size // 4096) for file in (runs.checkpoints("whole") / f"ba{STEPS}").iterdir())
    one = 4 * sum(pages)
    disk.resize(one * 3 // 2 + 40)  # room for one, and small files beside it
    name, root = "full-disk", disk.path / "checkpoints"
    for step, asynchronous in ((1, "false"), (1, "true")):
        code, said = runs(name, f"folder={disk.path}", f"checkpoints.asynchronous={asynchronous}")
        assert code == 2, said
        assert last(said) == f"dbrx-train: {root}/ba{step + 1}: No space left on device"
        assert [path.name for path in root.iterdir()] == [f"ba{step}"]
        assert folders.read(root / f"ba{step}").step == step
    disk.resize(100_000)
    code, said = runs(name, f"folder={disk.path}")
    assert code == 0, said
    assert f"goes on from {root}/ba1," in said
    shutil.copytree(disk.path, runs.folder(name))
    assert equal(runs.final(name), runs.final("whole"))


@pytest.mark.slow
def test_shards_on_a_full_disk_are_unpacked_where_there_is_room(
    runs: Runs, workplace: Path, disk: Disk, tmp_path: Path
) -> None:
    for name in ("web", "code"):
        shutil.copytree(workplace / name, disk.path / name, ignore=shutil.ignore_patterns("*.mds"))
    fill_up(str(disk.path))
    where = [f"data.sources.{name}.local={disk.path}/{name}" for name in ("web", "code")]
    code, said = runs.warm(*runs.command("no-room", *where), environment={"TMPDIR": str(tmp_path)})
    assert code == 0, said
    assert equal(runs.final("no-room"), runs.final("whole"))
    assert list(tmp_path.glob("dbrx-train-*/*/unpacked/**/*.mds"))


@pytest.mark.slow
def test_a_tracking_store_on_a_full_disk_stops_a_run_at_its_start_only(runs: Runs, disk: Disk) -> None:
    disk.resize(4096)
    shutil.copy(runs.yaml.parent / "mlruns.db", disk.path)
    option = f"logging.mlflow_uri=sqlite:///{disk.path}/mlruns.db"
    code, said = runs("store", option, kind="fill", at="mkdir checkpoints/ba#.partial", disk=str(disk.path))
    assert code == 0, said
    assert "metrics wait" in said
    assert equal(runs.final("store"), runs.final("whole"))
    code, said = runs("store-2", option)
    assert code == 2, said
    assert last(said).startswith("dbrx-train: logging.mlflow_uri: sqlite:///")
    assert "full" in last(said)


@pytest.mark.slow
def test_a_tracking_server_out_of_reach_at_the_start_is_one_line(runs: Runs) -> None:
    with socket.socket() as silent:
        silent.bind(("127.0.0.1", 0))
        uri = f"http://127.0.0.1:{silent.getsockname()[1]}"
        for listening in (False, True):
            if listening:
                silent.listen()  # and never answers
            quick = {"TIMEOUT": "1", "MAX_RETRIES": "0"} if listening else {}
            quick = {f"MLFLOW_HTTP_REQUEST_{key}": value for key, value in quick.items()}
            code, said = runs.warm(*runs.command("away", f"logging.mlflow_uri={uri}"), environment=quick)
            assert code == 2, said
            assert last(said).startswith(f"dbrx-train: logging.mlflow_uri: {uri} cannot be used (")
            assert "Traceback" not in said
    assert not folders.saved(runs.checkpoints("away"))


class Server:
    """MLflow's own server, in a thread, that can be stopped and started again on its port."""

    def __init__(self) -> None:
        self.port = 0

    def start(self) -> None:
        from mlflow.server import app
        from werkzeug.serving import make_server

        self._server = make_server("127.0.0.1", self.port, app, threaded=True)
        self.port = self._server.port
        self._thread = threading.Thread(target=self._server.serve_forever, daemon=True)
        self._thread.start()

    def stop(self) -> None:
        self._server.shutdown()
        self._thread.join()
        self._server.server_close()


@pytest.mark.slow
def test_a_tracking_server_that_goes_and_comes_back_gets_all_metrics(
    runs: Runs, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    store = f"sqlite:///{tmp_path}/mlruns.db"
    monkeypatch.setenv("_MLFLOW_SERVER_FILE_STORE", store)  # which `mlflow server` sets for its app
    monkeypatch.setenv("_MLFLOW_SERVER_ARTIFACT_ROOT", str(tmp_path / "artifacts"))
    shutil.copy(runs.yaml.parent / "mlruns.db", tmp_path)
    server = Server()
    server.start()
    evaluation = ["evaluation.max_samples=1", "evaluation.interval=5ba", "evaluation.at_start=false"]
    assert runs("always-there", *evaluation)[0] == 0
    root = runs.checkpoints("away-for-a-while")

    def go_and_come_back() -> None:
        while not (root / "ba2").exists():
            time.sleep(0.01)
        server.stop()
        while not (root / "ba8").exists():
            time.sleep(0.01)
        server.start()

    thread = threading.Thread(target=go_and_come_back)
    thread.start()
    options = [f"logging.mlflow_uri=http://127.0.0.1:{server.port}", "checkpoints.keep=9"]
    try:
        code, said = runs("away-for-a-while", *options, *evaluation)  # which ends with metrics being sent
    finally:
        thread.join(60)
        server.stop()
    assert code == 0, said
    assert "metrics wait" in said
    assert equal(runs.final("away-for-a-while"), runs.final("always-there"))
    client = mlflow.MlflowClient(store)
    experiment = client.get_experiment_by_name("dbrx-train")
    assert experiment is not None
    (found,) = client.search_runs([experiment.experiment_id], "tags.run_name = 'away-for-a-while'")
    assert found.info.status == "FINISHED"
    losses = client.get_metric_history(found.info.run_id, "loss/train/total")
    assert [loss.step for loss in losses] == list(range(STEPS))
