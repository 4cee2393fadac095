"""A lease: a folder is one process group's alone for as long as that lives.

The holder is the file with the highest number in the folder's ``.lease``, which it touches every few seconds.
To claim the folder is to create the next number, and only one process can: so of two that find a dead
holder one is refused, and a holder that was only thought dead finds its successor.
"""

from __future__ import annotations

import json
import os
import shutil
import socket
import threading
import time
import uuid
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from datetime import UTC, datetime
from pathlib import Path
from types import TracebackType
from typing import Any

from dbrx_train.errors import Stopped, aside
from dbrx_train.files import atomic_write, naming_file

__all__ = [
    "FOLDER",
    "Lease",
    "LeaseHeld",
    "LeaseLost",
    "describe",
    "holder",
    "is_alive",
    "new_folder",
    "scratch_folder",
]

FOLDER = ".lease"
RENEW_SECONDS = 10.0
STALE_SECONDS = 60.0
"""A holder on another machine that does not renew its lease for so long is dead."""
_JOBS = {"SLURM_JOB_ID": "Slurm job", "POD_NAME": "pod", "LSB_JOBID": "LSF job", "PBS_JOBID": "PBS job"}


class LeaseHeld(ValueError):
    """Another process holds it; the message says which."""


class LeaseLost(Stopped):
    """Another process has taken the folder over."""


class Lease:
    """Holds a folder from ``with`` on; a thread renews it.

    Args:
        folder: made if need be.
        lost: told, by the thread, who has taken the folder over.
        say: told what is being waited for.

    Raises:
        LeaseHeld: on entering, another process that lives holds the folder; the line says which.
        OSError: on entering, nothing can be written there.
    """

    def __init__(self, folder: Path, lost: Callable[[str], None], say: Callable[[str], None]) -> None:
        self.folder, self._root = folder, folder / FOLDER
        self._lost, self._say = lost, say
        self._number, self._token = 0, uuid.uuid4().hex
        self._over = threading.Event()

    def __enter__(self) -> Lease:
        self._root.mkdir(parents=True, exist_ok=True)
        while not self._claim():
            pass
        self._thread = threading.Thread(target=self._keep, name="lease", daemon=True)
        self._thread.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, _: TracebackType | None
    ) -> None:
        self._over.set()
        self._thread.join()
        # If this fails, the next one finds out that the process has ended.
        with suppress(OSError):
            if self._successor() is None:
                with atomic_write(self._path(self._number)) as partial:
                    partial.write_text(self._text(released=time.time()), encoding="utf-8")

    def check(self) -> None:
        """Raise LeaseLost if another process has taken the folder over."""
        if (successor := self._successor()) is not None:
            raise LeaseLost(f"lost {self.folder} to {describe(successor)}")

    def _claim(self) -> bool:
        """Whether the folder is ours now; if not, try again."""
        before = self._numbers()
        latest = before[-1] if before else 0
        if latest:
            self._refuse_if_held(self._path(latest))
        mine = self._path(latest + 1)
        try:
            with naming_file(mine), mine.open("x", encoding="utf-8") as file:
                file.write(self._text())
        except FileExistsError:
            return False
        except OSError:
            mine.unlink(missing_ok=True)
            raise
        self._number = latest + 1
        if self._numbers()[-1] > self._number:  # made while this process slept, and the number was free again
            mine.unlink(missing_ok=True)
            return False
        for old in before:
            self._path(old).unlink(missing_ok=True)
        return True

    def _refuse_if_held(self, path: Path) -> None:
        found = _read(path)
        if "released" in found:
            return
        alive = is_alive(found)
        if alive is None:
            alive = self._is_renewed(path, found)
        if alive:
            raise LeaseHeld(f"{self.folder}: is in use by {describe(found)}; wait for it, or stop it")

    def _is_renewed(self, path: Path, found: dict[str, Any]) -> bool:
        """Watch whether it is, without a look at any clock but this process' own."""
        began, first = time.monotonic(), _modified(path)
        told = False
        while time.monotonic() - began < STALE_SECONDS:
            time.sleep(min(1.0, RENEW_SECONDS / 4))
            if _modified(path) != first:
                return True
            if not told and time.monotonic() - began > 1.5 * RENEW_SECONDS:
                who = describe(found)
                self._say(f"{self.folder}: waiting up to {STALE_SECONDS:.0f} s to see if {who} still lives")
                told = True
        return False

    def _keep(self) -> None:
        while not self._over.wait(RENEW_SECONDS):
            try:
                self._renew()
                self.check()
            except LeaseLost as error:
                self._lost(str(error))
                return
            except OSError:  # of a file system that is out of reach for a while
                continue

    def _renew(self) -> None:
        mine = self._path(self._number)
        try:
            os.utime(mine)  # which needs no room on the disk
        except FileNotFoundError:
            if self._successor() is None:  # the folder was deleted
                self._root.mkdir(parents=True, exist_ok=True)
                with suppress(FileExistsError), mine.open("x", encoding="utf-8") as file:
                    file.write(self._text())

    def _successor(self) -> dict[str, Any] | None:
        """Who holds the folder, if it is another process: with a higher number or, after the folder was
        deleted, with any, ours included."""
        numbers = self._numbers()
        if not numbers:
            return None
        latest = _read(self._path(numbers[-1]))
        return None if latest.get("token") in (self._token, None) else latest

    def _text(self, **more: Any) -> str:
        return json.dumps(holder() | {"token": self._token, **more})

    def _numbers(self) -> list[int]:
        return sorted(int(path.stem) for path in self._root.glob("*.json") if path.stem.isdecimal())

    def _path(self, number: int) -> Path:
        return self._root / f"{number}.json"


@contextmanager
def scratch_folder(out: Path) -> Iterator[Path]:
    """A new folder to make ``out`` in, which no other process makes meanwhile; it is gone in the end.

    Raises:
        ValueError: ``out`` exists, or is being made by another process.
    """
    if os.path.lexists(out):
        raise ValueError(f"{out}: exists already; choose another, or delete it")
    partial = out.with_name(f"{out.name}.partial")
    with Lease(partial, lost=lambda _: None, say=aside) as lease:
        try:
            for left in partial.iterdir():  # by a process that was killed
                if left.name != FOLDER:
                    shutil.rmtree(left) if left.is_dir() else left.unlink()
            yield partial
            lease.check()
        finally:
            shutil.rmtree(partial, ignore_errors=True)


@contextmanager
def new_folder(out: Path) -> Iterator[Path]:
    """A folder to fill, which becomes ``out`` once it is whole. Raises as ``scratch_folder``."""
    with scratch_folder(out) as scratch:
        filled = scratch / out.name
        filled.mkdir()
        yield filled
        filled.rename(out)


def holder() -> dict[str, Any]:
    """What tells this process from all others, and a person which one it is."""
    job = next((f"{name} {os.environ[key]}" for key, name in _JOBS.items() if key in os.environ), None)
    return {
        "host": socket.gethostname(),
        "pid": os.getpid(),
        "job": job,
        "since": time.time(),
        "machine": _machine(),
        "started": _started(os.getpid()),
    }


def is_alive(found: dict[str, Any]) -> bool | None:
    """Whether a holder's process lives, if this machine can tell."""
    if found.get("machine") is None or found["machine"] != _machine() or _is_hidden(found["pid"]):
        return None
    return bool(found["started"] is not None and _started(found["pid"]) == found["started"])


def _machine() -> str | None:
    """Where process numbers mean the same; None if that is not known."""
    try:
        boot = Path("/proc/sys/kernel/random/boot_id").read_text(encoding="ascii").strip()
        return f"{boot}/{os.stat('/proc/self/ns/pid').st_ino}"
    except OSError:
        return None


def _is_hidden(pid: int) -> bool:
    """A process of another user's, of which this system tells nothing (``hidepid``)."""
    if _started(pid) is not None:
        return False
    try:
        os.kill(pid, 0)
    except PermissionError:
        return True
    except OSError:
        return False
    return False


def _started(pid: int) -> str | None:
    """When a process of this machine was started, in ticks since its boot; None if it has ended."""
    try:
        fields = Path(f"/proc/{pid}/stat").read_text(encoding="utf-8").rpartition(")")[2].split()
    except OSError:
        return None
    return None if fields[0] in "ZX" else fields[19]


def _read(path: Path) -> dict[str, Any]:
    """What a lease says; nothing if its writer was killed amid it."""
    for _ in range(20):
        try:
            found: dict[str, Any] = json.loads(path.read_text(encoding="utf-8"))
            return found
        except (OSError, ValueError):  # it may be being written
            time.sleep(0.05)
    return {}


def _modified(path: Path) -> int | None:
    try:
        with path.open("rb") as file:  # a network file system asks its server then
            return os.fstat(file.fileno()).st_mtime_ns
    except OSError:
        return None


def describe(found: dict[str, Any]) -> str:
    """A holder, for a person."""
    if "pid" not in found:
        return "another process"
    since = datetime.fromtimestamp(found["since"], UTC).strftime("%Y-%m-%d %H:%M:%S UTC")
    parts = [f"process {found['pid']} on {found['host']}", found.get("job"), f"since {since}"]
    return ", ".join(filter(None, parts))
