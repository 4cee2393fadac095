"""Commands of dbrx-train and programs, in forks of a process that has imported all: see ``fault_runs.py``."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from paths import HELPERS
from tiny_run import saved_tensors

STEPS = 14
"""Of the runs of ``Runs``."""
PROGRAM = str(HELPERS / "fault_runs.py")

# The system's clock as a process sees it, that may be made to jump
CLOCK = """
#define _GNU_SOURCE
#include <sys/syscall.h>
#include <sys/time.h>
#include <time.h>
#include <unistd.h>
long long clock_jump = 0;
int clock_gettime(clockid_t id, struct timespec *t) {
  int code = syscall(SYS_clock_gettime, id, t);
  if (id == CLOCK_REALTIME) t->tv_sec += clock_jump;
  return code;
}
int gettimeofday(struct timeval *restrict t, void *restrict zone) {
  struct timespec now;
  int code = clock_gettime(CLOCK_REALTIME, &now);
  t->tv_sec = now.tv_sec, t->tv_usec = now.tv_nsec / 1000;
  return code;
}
time_t time(time_t *t) {
  struct timespec now;
  clock_gettime(CLOCK_REALTIME, &now);
  if (t) *t = now.tv_sec;
  return now.tv_sec;
}
"""


@dataclass
class Rank:
    """How a rank ended, and what it said."""

    code: int
    out: str
    err: str


def inherited() -> dict[str, str]:
    """This process's environment, less what MLflow left in it of a run in this process."""
    return {k: v for k, v in os.environ.items() if k != "MLFLOW_TRACKING_URI"} | {"OMP_NUM_THREADS": "1"}


class Warm:
    """Runs commands, each with faults if it is given one.

    ``environment``: further variables, such as those that torch looks at once, when it is imported.
    """

    def __init__(self, folder: Path, environment: Mapping[str, str] | None = None) -> None:
        env = {**inherited(), "OPENBLAS_NUM_THREADS": "1", **(environment or {})}
        self._folder, self._number = folder, 0
        self.has_clock = self._compile()
        if self.has_clock:
            env["LD_PRELOAD"] = str(folder / "clock.so")
        pipes = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE, "text": True}
        self._process = subprocess.Popen([sys.executable, PROGRAM], env=env, **pipes)

    def _compile(self) -> bool:
        compiler = shutil.which("cc") or shutil.which("gcc")
        if compiler is None or sys.platform != "linux":
            return False
        (self._folder / "clock.c").write_text(CLOCK)
        command = [compiler, "-shared", "-fPIC", "-o", "clock.so", "clock.c"]
        return subprocess.run(command, cwd=self._folder, capture_output=True, timeout=60).returncode == 0

    def ranks(self, *command: str, ranks: int, **job: Any) -> tuple[list[int], str]:
        """The exit codes of so many ranks of a command, and what they said."""
        self._number += 1
        log = self._folder / f"{self._number}.log"
        assert self._process.stdin is not None
        assert self._process.stdout is not None
        line = {"command": command, "log": str(log), "ranks": ranks, **job}
        self._process.stdin.write(json.dumps(line) + "\n")
        self._process.stdin.flush()
        codes: list[int] = json.loads(self._process.stdout.readline())
        return codes, log.read_text() if log.exists() else ""

    def apart(self, *command: str, ranks: int, **job: Any) -> list[Rank]:
        """Of each of so many ranks of a command, its exit code and what it alone said."""
        name = self._folder / str(self._number + 1)
        codes, _ = self.ranks(*command, ranks=ranks, apart=True, out=f"{name}.out", **job)
        return [
            Rank(code, Path(f"{name}.out.{rank}").read_text(), Path(f"{name}.log.{rank}").read_text())
            for rank, code in enumerate(codes)
        ]

    def torchrun(self, ranks: int, program: str, *arguments: str) -> str:
        """What a program prints that so many ranks run; "-m", "dbrx_train" and more is the command."""
        out = self._folder / f"{self._number + 1}.out"
        how = {"out": str(out), "cwd": os.getcwd(), "environment": inherited(), "seconds": 400}
        if program == "-m":
            codes, said = self.ranks(*arguments[1:], ranks=ranks, **how)
        else:
            codes, said = self.ranks(ranks=ranks, program=program, arguments=arguments, **how)
        assert codes == [0] * ranks, (codes, said[-9000:])
        return out.read_text()

    def __call__(self, *command: str, **job: Any) -> tuple[int, str]:
        """The exit code of a command, and what it said."""
        (code,), said = self.ranks(*command, ranks=1, **job)
        return code, said

    def close(self) -> None:
        assert self._process.stdin is not None
        self._process.stdin.write(
            "end\n"
        )  # others may have inherited the pipe, so that closing it says nothing
        self._process.stdin.flush()
        self._process.wait(timeout=30)


class Runs:
    """Runs of one configuration, each in a folder of its own."""

    def __init__(self, warm: Warm, yaml: Path) -> None:
        self.warm, self.yaml = warm, yaml

    def folder(self, name: str) -> Path:
        return self.yaml.parent / name

    def checkpoints(self, name: str) -> Path:
        return self.folder(name) / "checkpoints"

    def command(self, name: str, *options: str) -> list[str]:
        return ["train", str(self.yaml), f"run_name={name}", *options]

    def __call__(self, name: str, *options: str, **fault: object) -> tuple[int, str]:
        faults = [{"root": str(self.folder(name)), **fault}] if fault else []
        return self.warm(*self.command(name, *options), faults=faults)

    def final(self, name: str) -> dict[str, torch.Tensor]:
        return saved_tensors(self.checkpoints(name) / f"ba{STEPS}")


def equal(one: dict[str, torch.Tensor], other: dict[str, torch.Tensor]) -> bool:
    return one.keys() == other.keys() and all(torch.equal(one[name], other[name]) for name in one)


def flip(path: Path) -> None:
    """Another byte in the middle of a file."""
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 0x55
    path.write_bytes(content)


def truncate(path: Path) -> None:
    path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])
