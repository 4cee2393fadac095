"""When one rank fails, all end within seconds, and its error is what is read."""

from __future__ import annotations

import os
import re
import subprocess
import sys
import time
from functools import partial
from pathlib import Path
from typing import NamedTuple

import pytest
from paths import HELPERS, ROOT
from ranks import free_port
from tiny_run import run_yaml
from warm import Warm

SUPERVISION = ROOT / "scripts" / "supervision" / "torchrun.py"
PROGRAM = HELPERS / "failing_rank.py"


class Launch(NamedTuple):
    """How three ranks of a program ended together, and what they said."""

    failed: bool
    out: str
    err: str


def by_torchrun(program: Path, *arguments: str) -> Launch:
    command = [sys.executable, "-m", "torch.distributed.run", "--nproc-per-node=3"]
    command += [f"--master-port={free_port()}", str(program), *arguments]
    env = {**os.environ, "OMP_NUM_THREADS": "1"}
    done = subprocess.run(command, env=env, capture_output=True, text=True, timeout=120)
    return Launch(done.returncode != 0, done.stdout, done.stderr)


def by_nobody(warm: Warm, folder: Path, program: Path, *arguments: str) -> Launch:
    """With no launcher that would end those who are left."""
    out = folder / "out"
    job = {"program": str(program), "arguments": arguments, "out": str(out), "seconds": 120}
    codes, said = warm.ranks(ranks=3, **job)
    return Launch(all(codes), out.read_text(), said)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("failing", "doing", "launched"), [(0, "waiting", False), (2, "waiting", True), (1, "computing", False)]
)
def test_an_error_on_one_rank_ends_all_and_comes_first(
    failing: int, doing: str, launched: bool, warm: Warm, tmp_path: Path
) -> None:
    ranks = by_torchrun if launched else partial(by_nobody, warm, tmp_path)
    done = ranks(PROGRAM, str(failing), doing)
    assert done.failed
    raised, *tidied = sorted(done.out.splitlines())
    assert time.time() - float(raised.removeprefix("raised at ")) < 15
    first = done.err.index(f"rank {failing} failed:")
    others = [line for line in done.err.splitlines() if "ends, for rank" in line]
    expected = f"rank 0 ends, for rank {failing} failed: KeyError: 'no such shard'"
    assert others == ([expected] if failing else [])  # one line a host
    assert all(done.err.index(line) > first for line in others)
    assert tidied == [f"rank {rank} tidied up" for rank in range(3) if rank != failing]
    assert "Connection closed by peer" not in done.err


@pytest.mark.slow
def test_a_signal_to_one_rank_ends_all(tmp_path: Path) -> None:
    program = tmp_path / "program.py"
    # One that does not end by itself, as it waits for others on its way out
    waits = "import atexit\natexit.register(lambda: time.sleep(300 if rank == failing else 0))\nwith end"
    program.write_text(PROGRAM.read_text(encoding="utf-8").replace("with end", waits, 1))
    done = by_torchrun(program, "1", "stopped")
    assert done.failed
    raised = next(line for line in done.out.splitlines() if line.startswith("raised at "))
    assert time.time() - float(raised.removeprefix("raised at ")) < 20
    assert "rank 0 ends, for rank 1 was stopped" in done.err


@pytest.mark.slow
def test_ranks_that_all_fail_alike_say_it_once(tmp_path: Path, warm: Warm) -> None:
    program = tmp_path / "program.py"
    program.write_text(PROGRAM.read_text(encoding="utf-8").replace("if rank == failing:", "if True:"))
    done = by_nobody(warm, tmp_path, program, "0", "waiting")
    (said,) = re.findall(r"^rank (\d) failed:$", done.err, re.MULTILINE)
    ends = re.findall(r"ends, for rank (\d) failed", done.err)
    assert set(ends) <= {said}, "the one on the launcher's own rank speaks for its host"


@pytest.mark.slow
@pytest.mark.parametrize("launcher", ["composer", "supervision"])
@pytest.mark.parametrize("mistake", ["parallelism.expert=3", "model.d_modle=1"])
def test_a_mistake_on_three_ranks_is_one_line_and_exit_code_2(
    workplace: Path, tmp_path: Path, launcher: str, mistake: str
) -> None:
    """Found before the ranks meet, or after."""
    commands = {
        "composer": [str(Path(sys.executable).parent / "composer"), "-n", "3", "--master_port"],
        "supervision": [sys.executable, str(SUPERVISION), "--nproc-per-node=3", "--master-port"],
    }
    command = [*commands[launcher], str(free_port()), "-m", "dbrx_train", "train"]
    done = subprocess.run(
        [
            *command,
            str(run_yaml(workplace, tmp_path, "mistaken")),
            "optimization.global_batch_size=6",
            mistake,
        ],
        env={**os.environ, "OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
        timeout=200,
    )
    assert done.returncode == 2, done
    said = done.stdout + done.stderr
    assert len(re.findall(r"^dbrx-train", said, re.MULTILINE)) == 1, said
    assert mistake.split("=")[0] in said
    assert "goes on from" not in said
    assert not (tmp_path / "mistaken").exists()
