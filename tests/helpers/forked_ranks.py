"""A program for tests: real ranks that faults befall, forked from one process so that all import once.

Reads from stdin, line by line, {"ranks", "arguments": of dbrx-train, "faults": [[rank, moment, step, deed]],
"folder": for what each rank prints}; answers each with a JSON list of the ranks' exit codes.

A moment is one of Composer's events, or "write": while the rank writes a checkpoint, or "batch": while its
data set makes one. A deed is "sleep" (five minutes), "nap" (three seconds), or the number of a signal to its
own process; "group NUMBER": to all in its process group; "parent NUMBER": to its launcher; "later NUMBER":
after three seconds; "once NUMBER": in the first run of this folder.

With a JSON list of faults as its first argument, it is a rank that a launcher has started.
"""

from __future__ import annotations

import contextlib
import json
import os
import signal
import sys
import threading
import time
import traceback
from collections.abc import Iterator
from functools import partial
from pathlib import Path
from typing import Any

import mlflow.store.tracking.sqlalchemy_store  # noqa: F401  # imported late, by every run
from composer import Callback, Event, Logger, State
from composer.utils import collect_env
from ranks import free_port, places

from dbrx_train.cli import main
from dbrx_train.data.stream.dataset import ScheduledDataset
from dbrx_train.data.tokenizer import load_tokenizer
from dbrx_train.errors import exit_code
from dbrx_train.train import run as runs
from dbrx_train.train.callbacks import checkpoints


def do(deed: str) -> None:
    kind, _, number = deed.rpartition(" ")
    if deed in ("sleep", "nap"):
        time.sleep(300 if deed == "sleep" else 3)
    elif kind == "group":
        os.killpg(0, int(number))
    elif kind == "parent":
        os.kill(os.getppid(), int(number))
    elif kind == "once":
        with contextlib.suppress(FileExistsError):
            Path("befallen").touch(exist_ok=False)
            os.kill(os.getpid(), int(number))
    elif kind == "later":
        threading.Timer(3, os.kill, [os.getpid(), int(number)]).start()
    else:
        os.kill(os.getpid(), int(number))


class Fault(Callback):  # type: ignore[misc]
    def __init__(self, moment: str, step: int, deed: str) -> None:
        self.moment, self.step, self.deed = moment, step, deed

    def run_event(self, event: Event, state: State, logger: Logger) -> None:
        if event.value == self.moment and state.timestamp.batch.value == self.step:
            do(self.deed)


def befall(moment: str, step: int, deed: str) -> None:
    """Have a fault happen in this process."""
    if moment == "write":
        write = checkpoints.write

        def faulty(folder: Path, *rest: Any) -> Any:
            if folder.stem == f"ba{step}":
                do(deed)
            return write(folder, *rest)

        checkpoints.write = faulty  # type: ignore[attr-defined]
    elif moment == "batch":
        batches = ScheduledDataset.__iter__

        def starving(dataset: ScheduledDataset) -> Iterator[Any]:
            for i, batch in enumerate(batches(dataset)):
                if i == step:
                    do(deed)
                yield batch

        ScheduledDataset.__iter__ = starving  # type: ignore[method-assign]
    else:
        build = runs.build_trainer

        def with_fault(*arguments: Any, **options: Any) -> Any:
            trainer = build(*arguments, **options)
            trainer.state.callbacks.insert(-1, Fault(moment, step, deed))  # ahead of Preemption
            return trainer

        runs.build_trainer = with_fault


def train(faults: list[Any], arguments: list[str]) -> None:
    for rank, *fault in faults:
        if rank == int(os.environ["RANK"]):
            befall(*fault)
    sys.argv = ["dbrx-train", *arguments]
    main()


def be_rank(rank: int, port: int, job: dict[str, Any]) -> None:
    os.setpgid(0, 0)
    os.environ.update(places(rank, job["ranks"], port))
    for number, name in ((1, "out"), (2, "err")):
        os.dup2(os.open(f"{job['folder']}/{name}{rank}", os.O_CREAT | os.O_WRONLY | os.O_APPEND), number)
    train(job["faults"], job["arguments"])


def fork(rank: int, port: int, job: dict[str, Any]) -> int:
    if pid := os.fork():
        return pid
    code = 1
    try:
        be_rank(rank, port, job)
    except SystemExit as error:
        code = exit_code(error)
    except BaseException:
        traceback.print_exc()
    finally:
        sys.stdout.flush()
        os._exit(code)  # gloo's own farewell hangs now and then


def run(job: dict[str, Any]) -> list[int]:
    port = free_port()
    pids = [fork(rank, port, job) for rank in range(job["ranks"])]
    codes, deadline = dict[int, int](), time.monotonic() + 90
    while len(codes) < len(pids):
        for pid in pids:
            if pid not in codes:
                found, status = os.waitpid(pid, os.WNOHANG)
                if found:
                    codes[pid] = os.waitstatus_to_exitcode(status)
                elif time.monotonic() > deadline:
                    os.killpg(pid, signal.SIGKILL)
        time.sleep(0.05)
    return [codes[pid] for pid in pids]


if __name__ == "__main__":
    if len(sys.argv) > 1:
        train(json.loads(sys.argv[1]), sys.argv[2:])
    load_tokenizer("cl100k_base")  # what every run would take its time for
    collect_env.get_cpu_model = partial(str, collect_env.get_cpu_model())
    for line in sys.stdin:
        print(json.dumps(run(json.loads(line))), flush=True)
