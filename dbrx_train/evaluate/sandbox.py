"""The sandbox in which programs that a model wrote are run: namespaces and limits.

A program sees the system's read-only files under /usr and Python's own, and a small folder of its own in
memory; no network, no other process, no home, no environment. As root it is started as another user, for
root's limits do not bind.
"""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
import tempfile
from abc import ABC, abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

__all__ = ["Bubblewrap", "Ended", "Limits", "Sandbox", "Unsafe", "open_sandbox"]

_NOBODY = 65534
# The program comes by standard input; what it prints is kept in its own folder, of which the end is read.
_SCRIPT = """cat > main.py || exit 1
{limits}
"$@" main.py > out 2> err < /dev/null
code=$?
tail -c 2000 out
tail -c 500 err >&2
exit $code
"""


@dataclass(frozen=True)
class Limits:
    """What a program may use."""

    seconds: float = 10.0
    """By the clock."""
    cpu_seconds: int = 5
    memory: int = 1 << 30
    """Bytes of a process's address space."""
    disk: int = 64 << 20
    """Bytes of all its files, and of each."""
    processes: int = 32
    files: int = 64
    """Open at a time."""


@dataclass(frozen=True)
class Ended:
    """What became of a program."""

    code: int | None
    """Its exit code, negative for a signal; None: it was ended, its time being over."""
    out: str
    """The end of its standard output."""
    err: str
    """The end of its standard error."""


class Sandbox(ABC):
    """Runs Python programs; here still without any walls."""

    def __init__(self, limits: Limits) -> None:
        self.limits = limits

    @abstractmethod
    def run(self, program: str) -> Ended:
        """Run a program to its end, or to that of its time."""

    def _script(self, with_processes: bool) -> str:
        limits = self.limits
        asked = {
            "c": 0,
            "t": limits.cpu_seconds,
            "v": limits.memory >> 10,
            "f": limits.disk >> 9,
            "n": limits.files,
        }
        if with_processes:
            asked["p"] = limits.processes
        return _SCRIPT.format(
            limits="\n".join(f"ulimit -{key} {value} || exit 1" for key, value in asked.items())
        )

    def _run(self, command: Sequence[str], program: str, **options: object) -> Ended:
        pipe = subprocess.PIPE
        process = subprocess.Popen(
            command, stdin=pipe, stdout=pipe, stderr=pipe, start_new_session=True, **options
        )  # type: ignore[call-overload]
        try:
            out, err = process.communicate(program.encode(errors="replace"), self.limits.seconds)
            code: int | None = process.returncode
        except subprocess.TimeoutExpired:
            os.killpg(process.pid, 9)
            out, err = process.communicate()
            code = None
        return Ended(code, out.decode(errors="replace"), err.decode(errors="replace"))


class Bubblewrap(Sandbox):
    """Programs between bubblewrap's walls (https://github.com/containers/bubblewrap)."""

    def __init__(self, limits: Limits, bwrap: str, python: Path) -> None:
        super().__init__(limits)
        self.user = {"user": _NOBODY, "group": _NOBODY, "extra_groups": []} if os.geteuid() == 0 else {}
        prefix = python.parent.parent
        shown = [] if prefix.is_relative_to("/usr") else ["--ro-bind", str(prefix), str(prefix)]
        links = [
            part
            for name in ("bin", "lib", "lib64", "lib32")
            if Path("/", name).is_symlink()
            for part in ("--symlink", f"usr/{name}", f"/{name}")
        ]
        self.command = [
            *(bwrap, "--unshare-all", "--die-with-parent", "--new-session", "--clearenv"),
            *("--cap-drop", "ALL", "--ro-bind", "/usr", "/usr", *links, *shown),
            *("--proc", "/proc", "--dev", "/dev", "--size", str(limits.disk), "--tmpfs", "/tmp"),
            *("--remount-ro", "/", "--chdir", "/tmp", "--setenv", "HOME", "/tmp"),
            *("--setenv", "PATH", "/usr/bin", "--setenv", "PYTHONHASHSEED", "0"),
            *("/bin/sh", "-c", self._script(with_processes=True), "sh", str(python), "-I", "-B"),
        ]

    def run(self, program: str) -> Ended:
        return self._run(self.command, program, cwd="/", **self.user)


class Unsafe(Sandbox):
    """No walls: programs are run as whoever runs this, with limits on time, memory and files alone."""

    def run(self, program: str) -> Ended:
        with tempfile.TemporaryDirectory() as folder:
            script = self._script(with_processes=False)
            return self._run(["/bin/sh", "-c", script, "sh", sys.executable, "-I", "-B"], program, cwd=folder)


def open_sandbox(unsafe: bool = False, limits: Limits | None = None) -> Sandbox:
    """A sandbox that works here, or with ``unsafe`` one without walls.

    Raises:
        ValueError: there is none; says what to install.
    """
    limits = limits or Limits()
    if unsafe:
        return Unsafe(limits)
    instead = "or give --unsafe-code to run what the model writes without any walls"
    bwrap = shutil.which("bwrap")
    if bwrap is None:
        raise ValueError(
            f"sandbox: generated code is run by bubblewrap, which is not installed; "
            f"apt install bubblewrap, {instead}"
        )
    pythons = [Path(sys.base_prefix, "bin", "python3").resolve(), Path("/usr/bin/python3")]
    said = "no Python"
    for python in (each for each in pythons if each.exists()):
        found = Bubblewrap(limits, bwrap, python)
        try:
            ended = found.run("print('here')")
        except OSError as error:
            said = str(error)
            continue
        if ended.code == 0 and ended.out == "here\n":
            return found
        said = (ended.err.strip().splitlines() or [f"exit code {ended.code}"])[-1]
    raise ValueError(
        f"sandbox: bubblewrap does not work here ({said}); allow user namespaces to unprivileged users, "
        f"{instead}"
    )
