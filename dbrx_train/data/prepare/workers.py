"""Parts handed out to worker processes: progress, stopping, and no process that outlives its parent."""

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
from functools import partial
from multiprocessing.context import SpawnContext

from rich.console import Console
from rich.progress import BarColumn, Progress, TaskProgressColumn, TextColumn, TimeRemainingColumn

from dbrx_train.data.prepare.sources import Part
from dbrx_train.data.prepare.tokenize import Job, run_part

__all__ = ["run_parts"]


class _Stopped(Exception):
    """Raised in a worker when the run is over."""


class _Meter:
    """Counts over all workers, and the wish that they stop."""

    def __init__(self, context: SpawnContext) -> None:
        self.size = context.Value("q", 0)
        self.tokens = context.Value("q", 0)
        self.stop = context.Event()

    def add(self, *, size: int = 0, tokens: int = 0) -> None:
        if self.stop.is_set():
            raise _Stopped
        for counter, amount in ((self.size, size), (self.tokens, tokens)):
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


def _work(job: Job, index: int, part: Part) -> None:
    assert _meter is not None
    run_part(job, index, part, _meter)


def run_parts(job: Job, parts: Sequence[Part], todo: Sequence[int], processes: int, progress: bool) -> None:
    """Run the parts whose numbers are in ``todo``; on any error, or Ctrl-C, stop the others and raise it.

    One process means this one. Raises ValueError when a worker process is killed.
    """
    if not todo:
        return
    context = multiprocessing.get_context("spawn")  # this process may have threads: no fork
    meter = _Meter(context)
    executor: Executor
    work: Callable[[Job, int, Part], None]
    if (count := min(processes, len(todo))) == 1:
        executor, work = ThreadPoolExecutor(1), partial(run_part, meter=meter)
    else:
        executor = ProcessPoolExecutor(count, context, initializer=_start_worker, initargs=(meter,))
        work = _work
    total = sum(span.size for index in todo for span in parts[index])
    with executor:
        try:
            futures = [executor.submit(work, job, index, parts[index]) for index in todo]
            _watch(futures, meter, total, progress)
        except BrokenProcessPool as error:
            raise ValueError(
                f"{job.out}: a worker process died, most likely for lack of memory; start again with fewer "
                f"processes, what is finished is kept"
            ) from error
        finally:
            meter.stop.set()
            executor.shutdown(cancel_futures=True)


def _watch(futures: Sequence[Future[None]], meter: _Meter, total: int, progress: bool) -> None:
    """Wait for all, drawing the progress bar; raises the first error."""
    columns = (
        TextColumn("tokenizing"),
        BarColumn(),
        TaskProgressColumn(),
        TextColumn("{task.fields[speed]}"),
        TimeRemainingColumn(),
    )
    show = progress and sys.stderr.isatty()
    with Progress(*columns, console=Console(stderr=True), disable=not show, transient=True) as bar:
        task = bar.add_task("", total=total, speed="")
        started, unfinished = time.monotonic(), set(futures)
        while unfinished:
            done, unfinished = wait(unfinished, timeout=0.2, return_when=FIRST_EXCEPTION)
            for future in futures:  # in the input's order, to raise the error that comes first there
                if future in done:
                    future.result()
            tokens = meter.tokens.value
            speed = f"{tokens:,} tokens, {tokens / (time.monotonic() - started):,.0f}/s"
            bar.update(task, completed=meter.size.value, speed=speed)
