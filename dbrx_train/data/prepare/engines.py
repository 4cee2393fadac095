"""Engines: who does a folder's tasks, processes of this machine or a Spark session.

A task writes its own files and marks them as done, last; so the same tasks give the same bytes on either, and
what was done stays done.
"""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
import warnings
from collections.abc import Iterator, Sequence
from typing import Any

from dbrx_train.data.prepare.workers import Task, Work, run_tasks
from dbrx_train.errors import first_line

__all__ = ["ENGINES", "check_engine", "run_on"]

ENGINES = ("local", "spark")
_JAVA = 17
"""The oldest Java that Spark 4 runs on."""


def check_engine(engine: str) -> None:
    """Raise ValueError unless this engine is one, and can be used here."""
    if engine not in ENGINES:
        raise ValueError(f"engine: {engine!r} is not one of {', '.join(ENGINES)}")
    if engine == "spark":
        try:
            import pyspark  # noqa: F401
        except ModuleNotFoundError:
            raise ValueError(
                "engine: pyspark is not installed; spark needs: pip install 'dbrx-train[spark]'"
            ) from None
        if "SPARK_REMOTE" not in os.environ and _active_session() is None:
            _check_java()


def run_on(engine: str, work: Work, processes: int | None, progress: bool) -> None:
    """Do the tasks on this engine; raises what a task raises, and ValueError when a worker is killed."""
    if engine == "local":
        run_tasks(work, processes, progress)
    elif work.tasks:
        _run_on_spark(work, processes)


def _check_java() -> None:
    home = os.environ.get("JAVA_HOME")
    java = os.path.join(home, "bin", "java") if home else shutil.which("java")
    wanted = f"spark needs Java {_JAVA} or newer: apt install openjdk-{_JAVA}-jre-headless, or set JAVA_HOME"
    if java is None or not os.path.exists(java):
        raise ValueError(f"engine: no Java found{f' at {java}' if java else ''}; {wanted}")
    said = subprocess.run([java, "-version"], capture_output=True, text=True, check=False).stderr
    quoted = said.partition('"')[2].partition('"')[0]  # as 17.0.15, or 1.8.0 of Java 8
    major = quoted.removeprefix("1.").partition(".")[0]
    if not major.isdigit() or int(major) < _JAVA:
        raise ValueError(f"engine: {java} is Java {quoted or 'of no known version'}; {wanted}")


def _active_session() -> Any:
    from pyspark.sql import SparkSession

    return SparkSession.getActiveSession()


def _session(processes: int | None) -> Any:
    """The active session, or a new one: of SPARK_REMOTE, of spark-submit, or local. It stays."""
    from pyspark.sql import SparkSession

    if (active := _active_session()) is not None:
        return active
    os.environ.setdefault("PYSPARK_PYTHON", sys.executable)
    builder = SparkSession.builder.appName("dbrx-train")
    if not {"SPARK_REMOTE", "PYSPARK_GATEWAY_PORT"} & os.environ.keys():
        builder = builder.master(f"local[{processes or '*'}]")
        builder = builder.config("spark.ui.enabled", "false").config("spark.ui.showConsoleProgress", "false")
        # the log of the JVM's own trouble goes to its file; what ends the work is raised here
        builder = builder.config("spark.log.level", "OFF")
    return builder.getOrCreate()


def _run_on_spark(work: Work, processes: int | None) -> None:
    """One Spark task for each of ours; the folder must lie where driver and executors see it."""
    from pyspark.errors import PySparkException

    spark = _session(processes)
    try:
        if str(spark.conf.get("spark.speculation", "false")) == "true":
            raise ValueError(
                "engine: spark.speculation is on, and a part is written by one task at a time; set it false"
            )
        count = len(work.tasks)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            numbers = spark.range(0, count, 1, count)
            failures = numbers.mapInArrow(_Runner(work.tasks), "number long, mistake string").collect()
    except PySparkException as error:
        raise ValueError(
            f"{work.out}: Spark gave up ({first_line(error)}); start again, what is finished is kept"
        ) from error
    if failures:
        raise ValueError(min(failures).mistake)


class _Runner:
    """Runs the tasks whose numbers it is given, on an executor; gives users' mistakes as rows."""

    def __init__(self, tasks: Sequence[Task]) -> None:
        self.tasks = tasks

    def __call__(self, batches: Iterator[Any]) -> Iterator[Any]:
        import pyarrow as pa

        for batch in batches:
            for number in batch.column(0).to_pylist():
                try:
                    self.tasks[number](_NoMeter())
                except (ValueError, OSError) as error:
                    named = isinstance(error, OSError) and error.filename
                    mistake = f"{error.filename}: {error.strerror}" if named else str(error)  # type: ignore[union-attr]
                    yield pa.RecordBatch.from_pydict({"number": [number], "mistake": [mistake]})


class _NoMeter:
    """A meter that nobody reads: Spark stops its tasks itself."""

    def add(self, *, size: int = 0, made: int = 0) -> None:
        pass
