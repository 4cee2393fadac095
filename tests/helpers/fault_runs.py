"""A program for tests: commands of dbrx-train, to each of which something may happen, and other programs.

Imports all that is heavy once, then reads jobs from its standard input, a JSON object a line, and forks for
each:
{"command": arguments of dbrx-train, "faults": what happens, "log": a file for what is said, "ranks": how many
processes, "apart": whether each has files of its own, with its number after the name, "environment": further
variables, "seconds": after which they are ended}; or with "program" and its "arguments" in place of the
command, "out" for what it prints, and "cwd". For each job it prints the exit codes of all ranks as a JSON
list; one that a signal ended is the signal's number, negative.

A fault is {"kind": ..., ...}; of several ranks, it happens to ``rank``, or to the first:

- kill: SIGKILL when the process is about to do ``at`` on a file of ``root`` (an operation as ``trace`` names
  it)
- torn: the process ends amid a write, when the file that it opens by ``at`` has ``bytes`` bytes
- limit: no file of the process may have more than ``bytes`` bytes
- trace: writes every operation on files of ``root`` to the file ``out``
- worker: SIGKILL to a worker of the data loader when the folder ``after`` is there
- fill: the disk of the folder ``disk`` is filled at the operation ``at``
- clock: the system's clock jumps by the next of ``seconds`` at every operation ``at``
- deed: ``deed`` at the moment ``at`` of the run's ``step``: see ``deeds.py``
- call: when ``of``, "module:name", is called for the ``time``-th time (the first), the process is sent the
  signal ``signal``, or the call raises RuntimeError or, of ``mistake``, ValueError
"""

from __future__ import annotations

import contextlib
import ctypes
import gc
import importlib
import itertools
import json
import multiprocessing
import os
import re
import resource
import runpy
import signal
import sys
import tempfile
import threading
import time
import traceback
from collections.abc import Callable
from pathlib import Path
from typing import Any

from ranks import free_port, places

EVENTS = {"open", "os.rename", "os.remove", "os.rmdir", "os.mkdir", "shutil.rmtree"}


def operations(root: str, happen: Callable[[str], None]) -> None:
    """Tell of every operation on a file below ``root`` before it is done, without the numbers of steps."""

    def hook(event: str, arguments: tuple[Any, ...]) -> None:
        if event not in EVENTS or not isinstance(arguments[0], str | os.PathLike):
            return
        path = os.fspath(arguments[0])
        amid = event == "os.remove" and not os.path.isabs(path) and arguments[1] != -1  # of shutil.rmtree
        if not (path.startswith(root) or amid):
            return
        name = os.path.relpath(path, root) if path.startswith(root) else path
        verb = event.removeprefix("os.").removeprefix("shutil.")
        if event == "open":
            flags = arguments[2]
            verb = "write" if flags & (os.O_WRONLY | os.O_RDWR) else "read"
        name = re.sub(
            r"\.\d+\.partial", ".#.partial", re.sub(r"[0-9a-f]{32}", "#", name)
        )  # a process's number
        happen(re.sub(r"ba\d+", "ba#", f"{verb} {name}"))

    sys.addaudithook(hook)


def kill(fault: dict[str, Any]) -> None:
    def happen(operation: str) -> None:
        if operation == fault["at"]:
            os.kill(os.getpid(), signal.SIGKILL)

    operations(fault["root"], happen)


def torn(fault: dict[str, Any]) -> None:
    signal.signal(signal.SIGXFSZ, signal.SIG_DFL)  # which Python ignores

    def happen(operation: str) -> None:
        if operation == fault["at"]:
            resource.setrlimit(resource.RLIMIT_FSIZE, (fault["bytes"], fault["bytes"]))

    operations(fault["root"], happen)


def limit(fault: dict[str, Any]) -> None:
    resource.setrlimit(resource.RLIMIT_FSIZE, (fault["bytes"], fault["bytes"]))


def trace(fault: dict[str, Any]) -> None:
    seen: list[str] = []

    def happen(operation: str) -> None:
        seen.append(operation)
        descriptor = os.open(fault["out"], os.O_WRONLY | os.O_CREAT | os.O_APPEND)
        os.write(descriptor, f"{operation}\n".encode())
        os.close(descriptor)

    operations(fault["root"], happen)


def worker(fault: dict[str, Any]) -> None:
    def watch() -> None:
        while not (Path(fault["after"]).exists() and multiprocessing.active_children()):
            time.sleep(0.005)
        pid = multiprocessing.active_children()[0].pid
        assert pid is not None
        os.kill(pid, signal.SIGKILL)

    threading.Thread(target=watch, daemon=True).start()


def clock(fault: dict[str, Any]) -> None:
    jumped, jumps = ctypes.c_longlong.in_dll(ctypes.CDLL(None), "clock_jump"), iter(fault["seconds"])

    def happen(operation: str) -> None:
        if operation == fault["at"]:
            jumped.value += next(jumps, 0)

    operations(fault["root"], happen)


def fill(fault: dict[str, Any]) -> None:
    def happen(operation: str) -> None:
        if operation == fault["at"]:
            fill_up(fault["disk"])

    operations(fault["root"], happen)


def deed(fault: dict[str, Any]) -> None:
    from deeds import befall

    os.setpgid(0, 0)  # which a signal to its group is for
    befall(fault)


def call(fault: dict[str, Any]) -> None:
    module, _, path = fault["of"].partition(":")
    *owners, name = path.split(".")
    owner: Any = importlib.import_module(module)
    for each in owners:
        owner = getattr(owner, each)
    real, times = getattr(owner, name), itertools.count(1)

    def faulty(*arguments: Any, **options: Any) -> Any:
        if next(times) == fault.get("time", 1):
            if "signal" not in fault:
                raise (ValueError if fault.get("mistake") else RuntimeError)("what a test raises")
            os.kill(os.getpid(), fault["signal"])
        return real(*arguments, **options)

    setattr(owner, name, faulty)


def fill_up(disk: str) -> None:
    """Write a file until there is no room left."""
    with contextlib.suppress(OSError), open(os.path.join(disk, "filler"), "ab", buffering=0) as file:
        for size in (2**16, 1):
            with contextlib.suppress(OSError):
                while file.write(bytes(size)):
                    pass


FAULTS = {f.__name__: f for f in (fill, kill, torn, limit, trace, worker, clock, deed, call)}


def begin(job: dict[str, Any], rank: int, port: int) -> int:
    """Fork a rank; returns its process."""
    if pid := os.fork():
        return pid
    append = os.O_WRONLY | os.O_CREAT | os.O_APPEND
    own = f".{rank}" if job["apart"] else ""
    null, log = os.open(os.devnull, os.O_RDONLY), os.open(job["log"] + own, append)
    out = os.open(job["out"] + own, append) if "out" in job else log
    for target, source in ((0, null), (1, out), (2, log)):
        os.dup2(source, target)
    os.chdir(job.get("cwd", "."))
    os.environ.update(job.get("environment", {}))
    tempfile.tempdir = None  # to be looked up again
    if job["ranks"] > 1 or "program" in job:
        os.environ.update(places(rank, job["ranks"], port))
    for fault in job["faults"]:
        if fault.get("rank", 0) == rank:
            FAULTS[fault["kind"]](fault)
    code = 0
    try:
        if "program" in job:
            sys.argv = [job["program"], *job["arguments"]]
            runpy.run_path(job["program"], run_name="__main__")
        else:
            sys.argv = ["dbrx-train", *job["command"]]
            __main__.main()
    except SystemExit as end:
        code = end.code if isinstance(end.code, int) else int(end.code is not None)
    except BaseException:
        code = 99
        traceback.print_exc()
    finally:
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(code)


def outcome(pids: list[int], seconds: float) -> list[int]:
    """The exit codes; what has not ended in time is ended."""
    deadline, codes = time.monotonic() + seconds, dict[int, int]()
    while len(codes) < len(pids):
        for pid in pids:
            if pid not in codes and (found := os.waitpid(pid, os.WNOHANG))[0]:
                codes[pid] = os.waitstatus_to_exitcode(found[1])
        if time.monotonic() > deadline:
            for pid in set(pids) - codes.keys():
                os.kill(pid, signal.SIGKILL)
        time.sleep(0.005)
    return [codes[pid] for pid in pids]


def warm_up() -> None:
    """Do once what every run would do for itself, and no test is about."""
    import cpuinfo
    import matplotlib.backends.backend_agg  # noqa: F401
    import mlflow.store.tracking.sqlalchemy_store  # noqa: F401

    from dbrx_train.data.prepare import pipeline  # noqa: F401
    from dbrx_train.data.tokenizer import load_tokenizer
    from dbrx_train.train import run as training  # noqa: F401

    load_tokenizer()
    machine = cpuinfo.get_cpu_info()  # for which Composer starts a process of a second
    cpuinfo.get_cpu_info = lambda: machine
    gc.collect()
    gc.freeze()  # or each fork's first collection goes through all of this, and copies it


if __name__ == "__main__":
    from dbrx_train import __main__

    warm_up()
    for line in sys.stdin:
        if line == "end\n":
            os._exit(0)
        job = {"faults": [], "ranks": 1, "apart": False, "seconds": 150, **json.loads(line)}
        port = free_port()
        ranks = [begin(job, rank, port) for rank in range(job["ranks"])]
        print(json.dumps(outcome(ranks, job["seconds"])), flush=True)
