"""Scripts for supervisors, read by what is to run them."""

from __future__ import annotations

import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import pytest
import yaml
from paths import ROOT
from ranks import free_port

from dbrx_train.errors import STOPPED

FOLDER = ROOT / "scripts" / "supervision"
SLURM = """
ClusterName=test
SlurmctldHost=localhost
SlurmctldPort={port}
SlurmUser=root
AuthType=auth/none
CredType=cred/none
StateSaveLocation={folder}/state
SlurmctldPidFile={folder}/slurmctld.pid
SlurmctldLogFile={folder}/slurmctld.log
ProctrackType=proctrack/pgid
TaskPlugin=task/none
SelectType=select/cons_tres
SelectTypeParameters=CR_Core
MpiDefault=none
GresTypes=gpu
NodeName=n[1-2] CPUs=64 Gres=gpu:8 State=CLOUD
PartitionName=all Nodes=ALL Default=YES MaxTime=INFINITE State=UP
"""


@pytest.fixture
def slurm(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """A Slurm controller of two nodes of eight GPUs, which are never there."""
    if os.geteuid() != 0 or not (shutil.which("slurmctld") and shutil.which("sbatch")):
        pytest.skip("needs root, and Slurm's slurmctld and sbatch")
    (tmp_path / "state").mkdir()
    conf = tmp_path / "slurm.conf"
    conf.write_text(SLURM.format(folder=tmp_path, port=free_port()))
    monkeypatch.setenv("SLURM_CONF", str(conf))
    controller = subprocess.Popen(["slurmctld", "-D", "-c", "-f", str(conf)], stderr=subprocess.DEVNULL)
    try:
        deadline = time.monotonic() + 30
        while subprocess.run(["sinfo"], capture_output=True, timeout=30).returncode:
            assert time.monotonic() < deadline, (tmp_path / "slurmctld.log").read_text()
            time.sleep(0.1)
        yield
    finally:
        controller.kill()
        controller.wait()


def test_slurm_takes_the_job(slurm: None) -> None:
    script = str(FOLDER / "slurm.sbatch")
    done = subprocess.run(
        ["sbatch", "--test-only", script, "run.yaml"], capture_output=True, text=True, timeout=60
    )
    assert done.returncode == 0, done.stderr
    assert "using 16 processors on nodes n[1-2]" in done.stderr


def test_a_slurm_job_is_requeued_by_its_exit_code(tmp_path: Path) -> None:
    """``srun`` and ``scontrol`` stand in for Slurm's."""
    (tmp_path / "srun").write_text("#!/bin/sh\nexit $CODE\n")
    (tmp_path / "scontrol").write_text('#!/bin/sh\necho "$@"\n')
    for name in ("srun", "scontrol"):
        (tmp_path / name).chmod(0o755)
    path = f"{tmp_path}:{os.environ['PATH']}"
    for code, restarts, requeued in (
        (0, 0, False),
        (2, 0, False),
        (75, 99, True),
        (74, 4, True),
        (74, 5, False),
    ):
        env = {**os.environ, "PATH": path, "CODE": str(code), "SLURM_JOB_ID": "7"}
        env["SLURM_RESTART_COUNT"] = str(restarts)
        done = subprocess.run(
            ["bash", str(FOLDER / "slurm.sbatch"), "run.yaml"],
            env=env,
            capture_output=True,
            text=True,
            timeout=30,
        )
        assert (done.stdout == "requeue 7\n") == requeued, (code, restarts)
        assert requeued or done.returncode == code


@pytest.mark.parametrize("script", ["restart.sh", "slurm.sbatch"])
def test_bash_can_read_it(script: str) -> None:
    done = subprocess.run(["bash", "-n", str(FOLDER / script)], capture_output=True, text=True, timeout=30)
    assert done.returncode == 0, done.stderr


def test_kubernetes_takes_the_job_in_the_jobset() -> None:
    kubernetes_validate = pytest.importorskip("kubernetes_validate")
    jobset = yaml.safe_load((FOLDER / "jobset.yaml").read_text())
    (replicated,) = jobset["spec"]["replicatedJobs"]
    job = {"apiVersion": "batch/v1", "kind": "Job", "metadata": {"name": "x"}, **replicated["template"]}
    kubernetes_validate.validate(job, kubernetes_validate.latest_version(), strict=True)
    spec = job["spec"]
    (container,) = spec["template"]["spec"]["containers"]
    stopped = spec["podFailurePolicy"]["rules"][0]
    assert stopped["onExitCodes"] == {
        "containerName": container["name"],
        "operator": "In",
        "values": [STOPPED],
    }
    assert subprocess.run(["bash", "-n", "-c", container["command"][2]], timeout=30).returncode == 0
    leader = f"{jobset['metadata']['name']}-{replicated['name']}-0-0.{jobset['spec']['network']['subdomain']}"
    assert f"--master-addr={leader} " in container["command"][2]
    del spec["template"]["spec"]["containers"][0]["image"]
    spec["backoffLimits"] = 1
    with pytest.raises(kubernetes_validate.ValidationError):
        kubernetes_validate.validate(job, kubernetes_validate.latest_version(), strict=True)


def restart(times: int, script: str, folder: Path) -> list[str]:
    return [
        "bash",
        str(FOLDER / "restart.sh"),
        str(times),
        "bash",
        "-c",
        f"echo run >> {folder}/runs; {script}",
    ]


@pytest.mark.parametrize(("code", "runs"), [(0, 1), (2, 1), (75, 1), (74, 3), (1, 3)])
def test_a_command_is_restarted_by_its_exit_code(tmp_path: Path, code: int, runs: int) -> None:
    done = subprocess.run(restart(2, f"exit {code}", tmp_path), capture_output=True, timeout=30)
    assert done.returncode == code
    assert len((tmp_path / "runs").read_text().split()) == runs


def test_a_signal_is_passed_on_and_its_code_back(tmp_path: Path) -> None:
    script = (
        f"trap 'exit 74' TERM; trap 'echo saved >> {tmp_path}/runs' USR1; while true; do sleep 0.05; done"
    )
    process = subprocess.Popen(restart(5, script, tmp_path), stderr=subprocess.DEVNULL)

    def wait_for(text: str) -> None:
        deadline = time.monotonic() + 20
        while text not in ((tmp_path / "runs").read_text() if (tmp_path / "runs").exists() else ""):
            assert time.monotonic() < deadline
            time.sleep(0.02)

    wait_for("run")
    time.sleep(0.3)  # to set its traps
    process.send_signal(signal.SIGUSR1)
    wait_for("saved")
    process.send_signal(signal.SIGTERM)
    assert process.wait(timeout=20) == 74, "and it is not started again"
    assert (tmp_path / "runs").read_text().split() == ["run", "saved"]


@pytest.mark.slow
def test_ctrl_c_at_torchruns_launcher_reaches_the_ranks(tmp_path: Path) -> None:
    program = tmp_path / "program.py"
    program.write_text(
        "import os, pathlib, signal, sys, time\n"
        "signal.signal(signal.SIGINT, lambda *_: sys.exit(130))\n"
        "pathlib.Path(os.environ['RANK']).touch()\n"
        "time.sleep(100)\n"
    )
    launch = [sys.executable, str(FOLDER / "torchrun.py"), "--nproc-per-node=2"]
    launch += [f"--master-port={free_port()}", str(program)]
    with subprocess.Popen(launch, cwd=tmp_path, stderr=subprocess.DEVNULL) as launcher:
        deadline = time.monotonic() + 100
        while not all((tmp_path / rank).exists() for rank in "01") and time.monotonic() < deadline:
            time.sleep(0.1)
        launcher.send_signal(signal.SIGINT)
        assert launcher.wait(timeout=60) == 130
