"""Launchers: two hosts that meet over a network, and Slurm's own."""

from __future__ import annotations

import json
import os
import re
import shutil
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from paths import HELPERS
from tiny_run import run_yaml, saved_tensors

from dbrx_train.config import load
from dbrx_train.train import environment
from dbrx_train.train.run import run

ADDRESSES = ("10.77.0.1", "10.77.0.2")


class Hosts:
    """Two network namespaces with a cable between them."""

    def __init__(self) -> None:
        self.names = tuple(f"dbrx{os.getpid()}-{i}" for i in range(2))

    def __enter__(self) -> Hosts:
        ends = tuple(f"v{os.getpid()}{side}" for side in "ab")
        for name in self.names:
            self.ip("netns", "add", name)
        self.ip("link", "add", ends[0], "type", "veth", "peer", "name", ends[1])
        for name, end, address in zip(self.names, ends, ADDRESSES, strict=True):
            self.ip("link", "set", end, "netns", name)
            inside = ("-n", name)
            self.ip(*inside, "link", "set", end, "name", "eth0")
            self.ip(*inside, "address", "add", f"{address}/24", "dev", "eth0")
            self.ip(*inside, "link", "set", "eth0", "up")
            self.ip(*inside, "link", "set", "lo", "up")
        return self

    def __exit__(self, *error: object) -> None:
        for name in self.names:
            subprocess.run(["ip", "netns", "delete", name], check=False, capture_output=True)

    def ip(self, *arguments: str) -> None:
        subprocess.run(["ip", *arguments], check=True, capture_output=True, timeout=20)

    def run(self, commands: list[list[str]], cwd: Path) -> list[tuple[int, str, str]]:
        """One command on each host; exit codes, outputs and errors."""
        env = {**os.environ, "OMP_NUM_THREADS": "1", "GLOO_SOCKET_IFNAME": "eth0"}
        running = [
            subprocess.Popen(
                ["ip", "netns", "exec", name, *command],
                cwd=cwd,
                env=env,
                stdout=subprocess.PIPE,
                stderr=subprocess.PIPE,
                text=True,
            )
            for name, command in zip(self.names, commands, strict=True)
        ]
        try:
            told = [process.communicate(timeout=300) for process in running]
        finally:
            for process in running:
                process.kill()
        return [(process.returncode, *texts) for process, texts in zip(running, told, strict=True)]


@pytest.fixture(scope="module")
def hosts() -> Iterator[Hosts]:
    if os.geteuid() != 0 or shutil.which("ip") is None:
        pytest.skip("needs root and iproute2 to make network namespaces")
    made = Hosts()
    try:
        made.__enter__()
    except subprocess.CalledProcessError as error:
        made.__exit__()
        pytest.skip(f"this machine makes no network namespaces: {error.stderr.decode().strip()}")
    yield made
    made.__exit__()


def torchrun_on(address: str, *arguments: str, ranks: int = 2) -> list[str]:
    launch = [sys.executable, "-m", "torch.distributed.run", "--nnodes=2", f"--nproc-per-node={ranks}"]
    launch += ["--rdzv-backend=c10d", f"--rdzv-endpoint={ADDRESSES[0]}:29400", "--rdzv-id=test"]
    # A namespace's host name does not tell that the endpoint's address is its own.
    launch += [f"--rdzv-conf=is_host={int(address == ADDRESSES[0])}"]
    return [*launch, f"--local-addr={address}", *arguments]


@pytest.mark.slow
def test_two_hosts_train_what_one_process_does(hosts: Hosts, workplace: Path, tmp_path: Path) -> None:
    options = ["evaluation.max_samples=0", "max_duration=4ba", "optimization.microbatch_size=1"]
    run(load(run_yaml(workplace, tmp_path, "one"), options))
    path = run_yaml(workplace, tmp_path, "two")
    arguments = ["-m", "dbrx_train", "train", str(path), *options, "parallelism.replicate=2"]
    done = hosts.run([torchrun_on(address, *arguments, ranks=1) for address in ADDRESSES], tmp_path)
    assert [code for code, *_ in done] == [0, 0], done
    outputs = [output for _, output, _ in done]
    assert sorted(output.count("mlflow ui") for output in outputs) == [0, 1], "rank 0 alone speaks"
    one, two = (saved_tensors(tmp_path / name / "checkpoints" / "ba4") for name in ("one", "two"))
    for name in one:
        torch.testing.assert_close(two[name], one[name], rtol=1e-3, atol=1e-4)  # of steps of 1e-2


@pytest.mark.slow
def test_an_error_on_one_host_ends_the_other(hosts: Hosts, tmp_path: Path) -> None:
    program = str(HELPERS / "failing_rank.py")
    done = hosts.run([torchrun_on(address, program, "1", "computing") for address in ADDRESSES], tmp_path)
    assert all(code != 0 for code, *_ in done)
    assert sum("rank 1 failed:\n" in errors for *_, errors in done) == 1
    ends = [re.findall(r"rank \d ends, for rank 1 failed: KeyError: 'no such shard'", e) for *_, e in done]
    assert sorted(map(len, ends)) == [1, 1], "each host says why it ends"


SLURM = {
    "SLURM_PROCID": "2",
    "SLURM_STEP_NUM_TASKS": "5",
    "SLURM_LOCALID": "0",
    "SLURM_NODEID": "1",
    "SLURM_STEP_TASKS_PER_NODE": "2(x2),1",
    "SLURM_STEP_NODELIST": "n[1-3]",
    "SLURM_JOB_ID": "1234",
    "SLURM_STEP_ID": "5",
}


def test_what_srun_tells_its_tasks_is_understood(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The variables are those of srun 22.05; ``scontrol`` stands in for Slurm's."""
    scontrol = tmp_path / "scontrol"
    scontrol.write_text('#!/bin/sh\n[ "$*" = "show hostnames n[1-3]" ] && printf "n1\\nn2\\nn3\\n"\n')
    scontrol.chmod(0o755)
    monkeypatch.setenv("PATH", f"{tmp_path}:{os.environ['PATH']}")
    assert environment._from_slurm(SLURM) == {
        "RANK": "2",
        "WORLD_SIZE": "5",
        "LOCAL_RANK": "0",
        "LOCAL_WORLD_SIZE": "2",
        "NODE_RANK": "1",
        "MASTER_ADDR": "n1",
        "MASTER_PORT": "26219",
    }
    scontrol.unlink()  # as in a container
    given = environment._from_slurm({**SLURM, "MASTER_ADDR": "n1", "MASTER_PORT": "1"})
    assert not {"MASTER_ADDR", "MASTER_PORT"} & given.keys()


@pytest.mark.slow
def test_a_run_under_srun(workplace: Path, tmp_path: Path) -> None:
    if shutil.which("srun") is None:
        pytest.skip("needs Slurm")
    if not subprocess.run(["sinfo", "-h", "-t", "idle"], capture_output=True, timeout=100).stdout:
        pytest.skip("needs a Slurm cluster with idle nodes")
    path = run_yaml(workplace, tmp_path, "slurm")
    command = ["srun", "-n", "2", sys.executable, "-m", "dbrx_train", "train", str(path), "max_duration=2ba"]
    # What a run in this process has set would tell each task that it is alone.
    ranks = ("RANK", "WORLD_SIZE", "LOCAL_RANK", "LOCAL_WORLD_SIZE", "NODE_RANK")
    env = {key: value for key, value in os.environ.items() if key not in ranks}
    done = subprocess.run(command, cwd=tmp_path, env=env, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr
    assert done.stdout.count("mlflow ui") == 1
    manifest = json.loads((tmp_path / "slurm" / "checkpoints" / "ba2" / "checkpoint.json").read_text())
    assert manifest["ranks"] == 2
