"""Faults that happen at a moment of a run: {"at": a moment, "step": in which step, "deed": what happens}.

A moment is one of Composer's events, or "write": while the rank writes a checkpoint, or "batch": while its
data set makes one. A deed is "sleep" (five minutes), "nap" (three seconds), or the number of a signal to its
own process; "group NUMBER": to all in its process group; "parent NUMBER": to its launcher; "later NUMBER":
after three seconds; "once NUMBER": in the first run of this folder.

As a program it is dbrx-train on a rank that a launcher has started: deeds.py FAULTS ARGUMENTS..., where
FAULTS is a JSON list of such faults, each with its "rank".
"""

from __future__ import annotations

import contextlib
import json
import os
import sys
import threading
import time
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from composer import Callback, Event, Logger, State

from dbrx_train.cli import main
from dbrx_train.data.stream.dataset import ScheduledDataset
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


def befall(fault: Mapping[str, Any]) -> None:
    """Have a fault happen in this process."""
    moment, step, deed = fault["at"], fault["step"], fault["deed"]
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


if __name__ == "__main__":
    for given in json.loads(sys.argv[1]):
        if given["rank"] == int(os.environ["RANK"]):
            befall(given)
    sys.argv = ["dbrx-train", *sys.argv[2:]]
    main()
