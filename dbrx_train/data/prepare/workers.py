"""Tasks handed out to worker processes: progress, stopping, and no process that outlives its parent."""

from __future__ import annotations

import multiprocessing
import os
import signal
import sys
import threading
import time
from collections.abc import Callable, Sequence
from concurrent.futures import (
    FIRST_EXCEPTION,
    Executor,
    Future,
    ProcessPoolExecutor,
    ThreadPoolExecutor,
    wait,
)
from concurrent.futures.process import BrokenProcessPool
from dataclasses import dataclass
from functools import partial
from multiprocessing.context import SpawnContext
from typing import Protocol

from rich.console import Console
from rich.progress import BarColumn, Progress, TaskProgressColumn, TextColumn, TimeRemainingColumn

__all__ = ["Meter", "Task", "Work", "cores", "run_tasks"]


class Meter(Protocol):
    """Hears how far a worker is; raises to make it stop."""

    def add(self, *, size: int = 0, made: int = 0) -> None:
        """``size`` more bytes read, ``made`` more units made (tokens, documents)."""


Task = Callable[[Meter], None]
"""What one process does in one go; picklable, and alike whoever does it and however often."""


@dataclass(frozen=True)
class Work:
    """Tasks to be done, in any order, and how to speak of them."""

    tasks: Sequence[Task]
    bytes: int
    """Read by all of them."""
    verb: str
    """As "tokenizing"."""
    unit: str
    """As "tokens"."""
    out: str
    """The folder that is made, for errors."""


class _Stopped(Exception):
    """Raised in a worker when the run is over."""


class _Meter:
    """Counts over all workers, and the wish that they stop."""

    def __init__(self, context: SpawnContext) -> None:
        self.size = context.Value("q", 0)
        self.made = context.Value("q", 0)
        self.stop = context.Event()

    def add(self, *, size: int = 0, made: int = 0) -> None:
        if self.stop.is_set():
            raise _Stopped
        for counter, amount in ((self.size, size), (self.made, made)):
            if amount:
                with counter.get_lock():
                    counter.value += amount


_meter: _Meter | None = None
"""In a worker process: its parent's."""


def _start_worker(meter: _Meter) -> None:
    global _meter
    _meter = meter
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # the parent hears Ctrl-C too, and sets meter.stop
    threading.Thread(target=_die_with_parent, daemon=True).start()


def _die_with_parent() -> None:
    parent = multiprocessing.parent_process()
    assert parent is not None
    parent.join()
    os._exit(1)


def _work(task: Task) -> None:
    assert _meter is not None
    task(_meter)


def cores() -> int:
    """CPU cores that this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def run_tasks(work: Work, processes: int | None, progress: bool) -> None:
    """Do all tasks; on any error, or Ctrl-C, stop the others and raise it.

    One process means this one; None, one a core. Raises ValueError when a worker process is killed.
    """
    if not work.tasks:
        return
    context = multiprocessing.get_context("spawn")  # this process may have threads: no fork
    meter = _Meter(context)
    executor: Executor
    do: Callable[[Task], None]
    if (count := min(processes or cores(), len(work.tasks))) == 1:
        executor, do = ThreadPoolExecutor(1), partial(_with, meter)
    else:
        executor = ProcessPoolExecutor(count, context, initializer=_start_worker, initargs=(meter,))
        do = _work
    with executor:
        try:
            futures = [executor.submit(do, task) for task in work.tasks]
            _watch(futures, meter, work, progress)
        except BrokenProcessPool as error:
            raise ValueError(
                f"{work.out}: a worker process died, most likely for lack of memory; start again with fewer "
                f"processes, what is finished is kept"
            ) from error
        finally:
            meter.stop.set()
            executor.shutdown(cancel_futures=True)


def _with(meter: Meter, task: Task) -> None:
    task(meter)


def _watch(futures: Sequence[Future[None]], meter: _Meter, work: Work, progress: bool) -> None:
    """Wait for all, drawing the progress bar; raises the first error."""
    columns = (
        TextColumn(work.verb),
        BarColumn(),
        TaskProgressColumn(),
        TextColumn("{task.fields[speed]}"),
        TimeRemainingColumn(),
    )
    show = progress and sys.stderr.isatty()
    with Progress(*columns, console=Console(stderr=True), disable=not show, transient=True) as bar:
        task = bar.add_task("", total=work.bytes, speed="")
        started, unfinished = time.monotonic(), set(futures)
        while unfinished:
            done, unfinished = wait(unfinished, timeout=0.2, return_when=FIRST_EXCEPTION)
            for future in futures:  # in the input's order, to raise the error that comes first there
                if future in done:
                    future.result()
            made = meter.made.value
            speed = f"{made:,} {work.unit}, {made / (time.monotonic() - started):,.0f}/s"
            bar.update(task, completed=meter.size.value, speed=speed)
