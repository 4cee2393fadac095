"""Checkpoints of real runs: while training goes on, on an object store, as weights for another run."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
import threading
from collections import Counter
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import boto3
import mlflow
import pytest
import torch
from composer import Logger, State
from composer.utils import maybe_create_object_store_from_uri
from composer.utils.object_store import S3ObjectStore
from moto.server import ThreadedMotoServer
from tiny_run import run_yaml, saved_tensors
from warm import Warm

from dbrx_train.checkpoint import folder as folders
from dbrx_train.checkpoint.remote import Remote
from dbrx_train.config import ConfigError, load
from dbrx_train.train.callbacks import checkpoints
from dbrx_train.train.callbacks.checkpoints import Checkpoints
from dbrx_train.train.resume import open_remote
from dbrx_train.train.run import run

# Nothing in these depends on how long the run is to be.
QUICK = ["evaluation.max_samples=0", "data.mix=[{at: 0tok, weights: {web: 1, code: 1}}]"]
QUICK += ["optimization.learning_rate.schedule=constant"]


@pytest.fixture
def in_tmp(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.chdir(tmp_path)
    return tmp_path


@pytest.fixture
def bucket(monkeypatch: pytest.MonkeyPatch) -> Iterator[str]:
    """The URL of a bucket on an S3 server of this machine."""
    monkeypatch.setattr("dbrx_train.checkpoint.remote_lease.SETTLE_SECONDS", 0.1)
    server = ThreadedMotoServer(ip_address="127.0.0.1", port=0, verbose=False)
    server.start()
    host, port = server.get_host_and_port()
    for key, value in {
        "S3_ENDPOINT_URL": f"http://{host}:{port}",
        "AWS_ACCESS_KEY_ID": "test",
        "AWS_SECRET_ACCESS_KEY": "test",
        "AWS_DEFAULT_REGION": "us-east-1",
    }.items():
        monkeypatch.setenv(key, value)
    boto3.client("s3", endpoint_url=f"http://{host}:{port}").create_bucket(Bucket="runs")
    yield "s3://runs/deep/er"
    server.stop()


def equal(one: Path, other: Path) -> bool:
    a, b = saved_tensors(one), saved_tensors(other)
    return a.keys() == b.keys() and all(torch.equal(a[name], b[name]) for name in a)


@pytest.mark.slow
def test_what_is_written_beside_training_is_what_was_due(
    workplace: Path, in_tmp: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    run(
        load(
            run_yaml(workplace, in_tmp, "direct"), [*QUICK, "checkpoints.interval=1ba", "checkpoints.keep=9"]
        )
    )
    moved_on, seen = threading.Event(), list[tuple[str, int]]()
    write, step, wait = checkpoints.write, [0], Checkpoints.wait

    def late(folder: Path, *rest: Any) -> dict[str, int]:
        moved_on.wait(60)
        seen.append((folder.stem, step[0]))
        return write(folder, *rest)

    def batch_start(self: Checkpoints, state: State, logger: Logger) -> None:
        step[0] = state.timestamp.batch.value
        if self.pending is not None:
            moved_on.set()

    def waited(self: Checkpoints) -> None:
        moved_on.set()
        wait(self)
        moved_on.clear()

    monkeypatch.setattr(checkpoints, "write", late)
    monkeypatch.setattr(Checkpoints, "batch_start", batch_start)
    monkeypatch.setattr(Checkpoints, "wait", waited)
    options = ["checkpoints.interval=3ba", "checkpoints.asynchronous=true"]
    run(load(run_yaml(workplace, in_tmp, "beside"), [*QUICK, *options]))
    assert seen[:2] == [("ba3", 3), ("ba6", 6)], "written while the step after it is taken"
    found = folders.saved(in_tmp / "beside" / "checkpoints")
    assert [path.name for path in found] == ["ba8", "ba6", "ba3"]
    for path in found:
        assert equal(path, in_tmp / "direct" / "checkpoints" / path.name)


@pytest.mark.slow
def test_a_failure_beside_training_ends_the_run_and_loses_nothing_saved(
    workplace: Path, in_tmp: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    write = checkpoints.write

    def full(folder: Path, *rest: Any) -> dict[str, int]:
        if folder.stem == "ba4":
            raise OSError(28, "No space left on device", str(folder))
        return write(folder, *rest)

    monkeypatch.setattr(checkpoints, "write", full)
    config = load(run_yaml(workplace, in_tmp, "full"), [*QUICK, "checkpoints.asynchronous=true"])
    with pytest.raises(OSError, match="No space left on device") as caught:
        run(config)
    assert caught.value.filename == str(in_tmp / "full" / "checkpoints" / "ba4")
    assert [path.name for path in folders.saved(in_tmp / "full" / "checkpoints")] == ["ba2"]


@pytest.mark.slow
def test_an_object_store_has_all_that_a_new_machine_needs(
    workplace: Path, in_tmp: Path, bucket: str, capsys: pytest.CaptureFixture[str], warm: Warm
) -> None:
    run(load(run_yaml(workplace, in_tmp, "straight"), QUICK))
    path, remote = run_yaml(workplace, in_tmp, "moved"), f"checkpoints.remote={bucket}"
    for asynchronous in ("true", "false"):
        shutil.rmtree(in_tmp / "moved", ignore_errors=True)
        begin = [
            *QUICK,
            f"{remote}-{asynchronous}",
            f"run_name=moved-{asynchronous}",
            f"folder={in_tmp}/moved",
        ]
        begin += [f"checkpoints.asynchronous={asynchronous}"]
        run(load(path, [*begin, "max_duration=4ba"]))
        shutil.rmtree(in_tmp / "moved")
        capsys.readouterr()
        # Two ranks, each of which fetches the parts of one, and leaves its own there.
        options = [*begin, "parallelism.expert=2", "max_duration=6ba"]
        said = warm.torchrun(2, "-m", "dbrx_train", "train", str(path), *options)
        assert "ba4.fetched, after 512 tokens" in said
        assert sorted(p.name for p in (in_tmp / "moved" / "checkpoints").iterdir()) == ["ba6"]
        shutil.rmtree(in_tmp / "moved")
        run(load(path, begin))
        assert "ba6.fetched, after 768 tokens" in capsys.readouterr().out
        found = saved_tensors(in_tmp / "moved" / "checkpoints" / "ba8")
        for name, tensor in saved_tensors(in_tmp / "straight" / "checkpoints" / "ba8").items():
            torch.testing.assert_close(found[name], tensor, rtol=1e-3, atol=1e-4)
    # What is damaged there is passed over; and a store is one run's alone.
    s3 = boto3.client("s3", endpoint_url=os.environ["S3_ENDPOINT_URL"])
    prefix = f"{bucket.removeprefix('s3://runs/')}-false"
    s3.put_object(Bucket="runs", Key=f"{prefix}/ba20/{folders.MANIFEST}", Body=b"{}")
    s3.put_object(Bucket="runs", Key=f"{prefix}/other/ba30/{folders.MANIFEST}", Body=b"{}")
    shutil.rmtree(in_tmp / "moved")
    run(load(path, begin))
    said = capsys.readouterr().out
    assert "passed over" in said
    assert "ba20" in said
    assert "ba30" not in said
    assert "is done" in said
    with pytest.raises(ConfigError, match=r"run_name: other here, but .* a store is one run's alone"):
        run(load(path, [*begin, "run_name=other"]))
    # A manifest comes last: without it, what lies there does not count.
    s3.delete_object(Bucket="runs", Key=f"{prefix}/ba8/{folders.MANIFEST}")
    shutil.rmtree(in_tmp / "moved")
    run(load(path, begin))
    assert "ba6.fetched" in capsys.readouterr().out


def test_a_bucket_itself_may_hold_a_runs_checkpoints(bucket: str, tmp_path: Path) -> None:
    store = maybe_create_object_store_from_uri("s3://runs")
    assert store is not None
    remote, partial = Remote(store, ""), tmp_path / "ba0.partial"
    (partial).mkdir()
    files = {".metadata": 3}
    (partial / ".metadata").write_bytes(b"abc")
    folders.commit(partial, {"config": {}, "data": {}, "files": files, "time": {"batch": 0, "token": 0}})
    remote.upload(partial, [".metadata", folders.MANIFEST])
    found = next(remote.whole(tmp_path, pytest.fail), None)
    assert found is not None
    remote.fetch(found, ".metadata")
    assert (found.folder / ".metadata").read_bytes() == b"abc"
    (partial / ".metadata").write_bytes(b"ab")
    remote.upload(partial, [".metadata"])
    (found.folder / ".metadata").unlink()
    with pytest.raises(ValueError, match="has 2 bytes there, not 3 as written"):
        remote.fetch(found, ".metadata")
    remote.withdraw(partial)
    heard: list[str] = []
    assert next(remote.whole(tmp_path, heard.append), None) is None
    assert "not a whole checkpoint" in heard[0]


SLOW = """
import os, sys, time
from dbrx_train.checkpoint.remote import Remote
from dbrx_train.cli import main

upload = Remote.upload
def slow(self, folder, names):
    time.sleep(2 * int(os.environ["RANK"]))
    upload(self, folder, names)
Remote.upload = slow
main()
"""


@pytest.mark.slow
def test_a_checkpoint_waits_for_the_slowest_copy(
    workplace: Path, in_tmp: Path, bucket: str, warm: Warm
) -> None:
    (in_tmp / "slow.py").write_text(SLOW)
    path = run_yaml(workplace, in_tmp, "slow")
    options = [*QUICK, f"checkpoints.remote={bucket}-slow", "checkpoints.asynchronous=true"]
    options += ["max_duration=2ba"]
    warm.torchrun(2, "slow.py", "train", str(path), *options)
    found = open_remote(load(path, options))
    assert found is not None
    newest = next(found.whole(in_tmp, pytest.fail), None)
    assert newest is not None
    assert newest.step == 2


@pytest.mark.slow
def test_a_copy_that_fails_is_tried_again_then_reported_and_ends_nothing(
    workplace: Path, in_tmp: Path, bucket: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """At step 2 a file comes through at the third try, at 4 never, and at 6 the manifest does not."""
    upload, tries = S3ObjectStore.upload_object, Counter[str]()

    def lossy(store: S3ObjectStore, name: str, filename: str, **rest: Any) -> None:
        tries[name.rsplit("/", 2)[-2] + "/" + Path(name).name] += 1
        if "ba2/__0_0" in name and tries["ba2/__0_0.distcp"] < 3:
            raise ConnectionError("connection lost")
        if "ba4/__0_0" in name or name.endswith(f"ba6/{folders.MANIFEST}"):
            raise ConnectionError("connection lost for good")
        upload(store, name, filename, **rest)

    monkeypatch.setattr(S3ObjectStore, "upload_object", lossy)
    monkeypatch.setattr("dbrx_train.checkpoint.remote.WAITS", (0.01, 0.01, 0.01))
    options = [*QUICK, f"checkpoints.remote={bucket}-cut", "checkpoints.keep=1"]
    options += ["checkpoints.prune_remote=true"]
    options += ["logging.interval=1ba"]
    config = load(run_yaml(workplace, in_tmp, "cut"), options)
    root, s3 = in_tmp / "cut" / "checkpoints", open_remote(config)
    assert s3 is not None
    with pytest.warns(UserWarning, match="is whole, but it cannot be copied to checkpoints.remote") as warned:
        run(replace(config, max_duration="6ba"))
    said = [str(each.message) for each in warned if "cannot be copied" in str(each.message)]
    assert [f"{root}/ba{step} is" in line for step, line in zip((4, 6), said, strict=True)] == [True, True]
    assert "(rank 0: connection lost for good)" in said[0]
    assert tries["ba2/__0_0.distcp"] == 3
    assert tries["ba4/__0_0.distcp"] == 4
    # Here the newest is kept; there the last that came through whole still is.
    assert [path.name for path in root.iterdir()] == ["ba6"]
    assert s3.steps() == [2]
    client = mlflow.MlflowClient(f"sqlite:///{workplace}/mlruns.db")
    experiment = client.get_experiment_by_name("dbrx-train")
    assert experiment is not None
    (found,) = client.search_runs([experiment.experiment_id], "tags.run_name = 'cut'")
    counts = client.get_metric_history(found.info.run_id, "checkpoints/not_copied")
    assert [count.value for count in counts] == [0, 1, 2]
    # The next one replaces it there, and what never got a manifest goes too.
    run(config)
    assert s3.steps() == [8]
    client = boto3.client("s3", endpoint_url=os.environ["S3_ENDPOINT_URL"])
    left = client.list_objects_v2(Bucket="runs", Prefix="deep/er-cut/")["Contents"]
    assert {each["Key"].split("/")[2] for each in left} == {"ba8", ".lease.json"}


@pytest.mark.slow
def test_a_damaged_file_on_a_store_leads_to_the_checkpoint_before(
    workplace: Path, in_tmp: Path, bucket: str, capsys: pytest.CaptureFixture[str]
) -> None:
    path = run_yaml(workplace, in_tmp, "there")
    options = [*QUICK, f"checkpoints.remote={bucket}-there"]
    run(load(path, options))
    whole = saved_tensors(in_tmp / "there" / "checkpoints" / "ba8")
    shutil.rmtree(in_tmp / "there")
    s3 = boto3.client("s3", endpoint_url=os.environ["S3_ENDPOINT_URL"])
    key = "deep/er-there/ba8/__0_0.distcp"
    content = bytearray(s3.get_object(Bucket="runs", Key=key)["Body"].read())
    content[len(content) // 2] ^= 1
    s3.put_object(Bucket="runs", Key=key, Body=bytes(content))
    capsys.readouterr()
    run(load(path, options))
    said = capsys.readouterr().out
    assert "ba8.fetched/__0_0.distcp: is damaged there: its content is not what was written" in said
    assert "ba6.fetched, after 768 tokens" in said
    found = saved_tensors(in_tmp / "there" / "checkpoints" / "ba8")
    assert all(torch.equal(found[name], tensor) for name, tensor in whole.items())


@pytest.mark.slow
@pytest.mark.parametrize("uri", ["no/url", "nowhere://bucket/x", "s3://no-such-bucket/x"])
def test_a_store_that_is_not_there_is_one_line(workplace: Path, in_tmp: Path, bucket: str, uri: str) -> None:
    with pytest.raises(ConfigError, match=f"checkpoints.remote: {uri} ") as caught:
        run(load(run_yaml(workplace, in_tmp, "lost"), [*QUICK, f"checkpoints.remote={uri}"]))
    assert "\n" not in str(caught.value)


@pytest.mark.slow
def test_a_run_begins_with_the_weights_of_another(
    workplace: Path, in_tmp: Path, capsys: pytest.CaptureFixture[str], warm: Warm
) -> None:
    run(load(run_yaml(workplace, in_tmp, "base"), QUICK))
    base = saved_tensors(in_tmp / "base" / "checkpoints" / "ba8")
    command = [
        sys.executable,
        "-m",
        "dbrx_train",
        "checkpoint",
        "consolidate",
        "base",
        "--out",
        "base.safetensors",
    ]
    done = subprocess.run(command, capture_output=True, text=True, timeout=100)
    assert done.returncode == 0, done.stderr
    assert done.stdout == f"base.safetensors: {(in_tmp / 'base.safetensors').stat().st_size:,} bytes\n"
    still = ["max_duration=1ba", "optimization.optimizer.lr=1e-30"]
    for i, source in enumerate(("base", "base/checkpoints/ba8", "base.safetensors")):
        path = run_yaml(workplace, in_tmp, f"next{i}")
        options = [*QUICK, *still, f"init_from.path={source}"]
        if i == 1:
            run(load(path, options))
        else:
            warm.torchrun(2, "-m", "dbrx_train", "train", str(path), *options, "parallelism.expert=2")
        found = saved_tensors(in_tmp / f"next{i}" / "checkpoints" / "ba1")
        models = [name for name in base if name.startswith("model.")]
        assert all(torch.equal(found[name], base[name]) for name in models)
        assert any((found[name] != base[name]).any() for name in base.keys() - models)
    path = run_yaml(workplace, in_tmp, "wrong")
    for options, says in (
        (["init_from.path=nowhere"], "init_from.path: nowhere: no such file or folder"),
        (["init_from.path=base", "model.n_layers=3"], r"model.n_layers: 3 here, but base was saved with 2$"),
    ):
        with pytest.raises(ConfigError, match=says):
            run(load(path, [*QUICK, *options]))
