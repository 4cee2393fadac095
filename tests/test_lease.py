"""Leases: one holder at a time, whoever dies or is slow; and two starts of one run."""

from __future__ import annotations

import json
import os
import re
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path

import mlflow
import pytest
from tiny_run import run_yaml
from warm import Warm

from dbrx_train import lease as leases
from dbrx_train.checkpoint import folder as folders
from dbrx_train.lease import Lease, LeaseLost


def claim(folder: Path, said: list[str] | None = None) -> Lease:
    told: list[str] = [] if said is None else said
    return Lease(folder, lost=told.append, say=told.append)


@pytest.fixture
def quick(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(leases, "RENEW_SECONDS", 0.1)
    monkeypatch.setattr(leases, "STALE_SECONDS", 1.0)


def numbers(folder: Path) -> list[str]:
    return sorted(path.name for path in (folder / ".lease").iterdir())


def elsewhere(folder: Path, number: int = 1) -> Path:
    """The lease of a process on another machine."""
    path = folder / ".lease" / f"{number}.json"
    path.parent.mkdir(exist_ok=True)
    holder = {
        "host": "far",
        "pid": 7,
        "job": "Slurm job 42",
        "since": 0,
        "machine": "x",
        "started": "1",
        "token": "far",
    }
    path.write_text(json.dumps(holder))
    return path


def test_a_living_holder_is_named_and_a_released_folder_is_free(tmp_path: Path) -> None:
    with claim(tmp_path / "run"):
        said = rf"run: is in use by process {os.getpid()} on \S+, since 20.* UTC; wait for it, or stop it"
        with pytest.raises(ValueError, match=said), claim(tmp_path / "run"):
            pass
    with claim(tmp_path / "run"):
        assert numbers(tmp_path / "run") == ["2.json"]


def test_a_dead_holder_of_this_machine_is_succeeded_at_once(tmp_path: Path) -> None:
    if (child := os.fork()) == 0:
        claim(tmp_path).__enter__()
        os._exit(0)  # as a kill leaves it
    while numbers(tmp_path)[:1] != ["1.json"] if (tmp_path / ".lease").exists() else True:
        time.sleep(0.01)
    began = time.monotonic()
    os.waitid(os.P_PID, child, os.WEXITED | os.WNOWAIT)  # it has ended, and is not yet buried
    with claim(tmp_path):
        assert time.monotonic() - began < 2
    os.waitpid(child, 0)


@pytest.mark.usefixtures("quick")
def test_a_holder_elsewhere_lives_as_long_as_it_renews(tmp_path: Path) -> None:
    path, over = elsewhere(tmp_path), threading.Event()

    def renew() -> None:
        while not over.wait(0.1):
            os.utime(path, (0, time.monotonic()))  # its clock is wrong by decades

    thread = threading.Thread(target=renew)
    thread.start()
    with pytest.raises(ValueError, match="in use by process 7 on far, Slurm job 42, since"), claim(tmp_path):
        pass
    over.set()
    thread.join()
    said: list[str] = []
    with claim(tmp_path, said):
        assert numbers(tmp_path) == ["2.json"]
    (waiting,) = said
    assert "waiting up to 1 s to see if process 7 on far, Slurm job 42" in waiting


@pytest.mark.usefixtures("quick")
@pytest.mark.parametrize("number", [2, 1])
def test_a_holder_that_was_thought_dead_finds_its_successor(tmp_path: Path, number: int) -> None:
    """With the next number or, if somebody deleted the folder and started anew, with the same."""
    said: list[str] = []
    with claim(tmp_path, said) as ours:
        ours.check()
        elsewhere(tmp_path, number)
        with pytest.raises(LeaseLost, match=f"lost {tmp_path} to process 7 on far"):
            ours.check()
        deadline = time.monotonic() + 10
        while not said and time.monotonic() < deadline:
            time.sleep(0.05)
    assert said
    assert all(line.startswith(f"lost {tmp_path} to process 7 on far") for line in said)
    assert "released" not in json.loads((tmp_path / ".lease" / f"{number}.json").read_text()), (
        "it is not ours to release"
    )


@pytest.mark.usefixtures("quick")
def test_what_a_kill_left_half_written_and_a_deleted_folder(tmp_path: Path) -> None:
    (tmp_path / ".lease").mkdir()
    (tmp_path / ".lease" / "4.json").touch()
    with claim(tmp_path):
        (mine,) = (tmp_path / ".lease").iterdir()
        assert mine.name == "5.json"
        mine.unlink()
        deadline = time.monotonic() + 10
        while not mine.exists() and time.monotonic() < deadline:
            time.sleep(0.05)
        assert mine.exists()


@pytest.mark.parametrize("before", [False, True])
def test_of_many_that_start_together_one_holds(tmp_path: Path, before: bool) -> None:
    """Processes that claim a new folder, or one whose holder is dead, at the same moment, ten times over."""
    for turn in range(10):
        folder = tmp_path / f"{turn}"
        folder.mkdir()
        if before and (child := os.fork()) == 0:
            claim(folder).__enter__()
            os._exit(0)
        if before:
            os.waitpid(child, 0)
        (go, begin), (done, end) = os.pipe(), os.pipe()
        answers, answer = os.pipe()
        children = []
        for _ in range(6):
            if (child := os.fork()) == 0:
                code = b"1"
                try:
                    os.close(begin)
                    os.close(end)
                    os.read(go, 1)  # until all are there
                    with claim(folder):
                        code = b"0"
                        os.write(answer, code)
                        os.read(done, 1)  # until all have answered
                except ValueError:
                    code = b"2"
                    os.write(answer, code)
                finally:
                    os._exit(int(code))
            children.append(child)
        os.close(begin)
        codes = sorted(int(os.read(answers, 1)) for _ in children)
        os.close(end)
        for child in children:
            os.waitpid(child, 0)
        for each in (go, done, answers, answer):
            os.close(each)
        assert codes == [0, 2, 2, 2, 2, 2]


@pytest.mark.slow
def test_a_run_that_is_started_twice_goes_on_alone(workplace: Path, tmp_path: Path, warm: Warm) -> None:
    path = run_yaml(workplace, tmp_path, "started-twice")
    first = subprocess.Popen(
        [sys.executable, "-m", "dbrx_train", "train", str(path), "max_duration=100000ba", "data.mix=[]"],
        env={**os.environ, "OMP_NUM_THREADS": "1"},
        stdout=subprocess.DEVNULL,
        stderr=subprocess.PIPE,
        text=True,
    )
    try:
        saved = tmp_path / "started-twice" / "checkpoints"
        deadline = time.monotonic() + 120
        while not folders.saved(saved) and time.monotonic() < deadline:
            time.sleep(0.2)
        config = (tmp_path / "started-twice" / "config.yaml").read_text()
        code, said = warm("train", str(path), "optimization.optimizer.lr=0.1")
        assert code == 2
        (line,) = said.splitlines()
        assert re.match(
            rf"dbrx-train: .*/started-twice: is in use by process {first.pid} on \S+, since ", line
        )
        assert (tmp_path / "started-twice" / "config.yaml").read_text() == config
        codes, said = warm.ranks("train", str(path), ranks=2)
        assert codes == [2, 2]
        assert said.count("is in use by process") == len(said.splitlines()) == 1
    finally:
        first.send_signal(signal.SIGKILL)
        first.communicate(timeout=30)
    reached = folders.read(folders.saved(saved)[0]).step
    code, said = warm("train", str(path), f"max_duration={reached + 3}ba", "data.mix=[]")
    assert code == 0, said
    assert f"goes on from {saved}/ba{reached}" in said
    client = mlflow.MlflowClient(f"sqlite:///{workplace}/mlruns.db")
    experiment = client.get_experiment_by_name("dbrx-train")
    assert experiment is not None
    (found,) = client.search_runs([experiment.experiment_id], "tags.run_name = 'started-twice'")
    assert found.info.status == "FINISHED"


STORE = """
import os, time
from pathlib import Path
from dbrx_train.train.tracking.mlflow import MLflowStore

number = int(os.environ.pop("RANK"))
for name in ("LOCAL_RANK", "WORLD_SIZE", "LOCAL_WORLD_SIZE"):  # each is a run of its own
    del os.environ[name]
Path(f"{number}.ready").touch()
while len([*Path().glob("*.ready")]) < 3:
    time.sleep(0.001)
MLflowStore(
    uri="sqlite:///new/mlruns.db", experiment=f"experiment{number % 2}", run_name=f"{number}", resume=False
)
"""


@pytest.mark.slow
def test_runs_that_make_the_tracking_store_together_all_find_it(tmp_path: Path, warm: Warm) -> None:
    """Three at once, of which two want the same experiment."""
    (tmp_path / "store.py").write_text(STORE)
    codes, said = warm.ranks(program="store.py", arguments=[], ranks=3, cwd=str(tmp_path), seconds=120)
    assert codes == [0] * 3, said
    client = mlflow.MlflowClient(f"sqlite:///{tmp_path}/new/mlruns.db")
    assert {each.name for each in client.search_experiments()} == {"Default", "experiment0", "experiment1"}
