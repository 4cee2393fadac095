"""Composer's MLflow logger, made safe to resume and cheap per step."""

from __future__ import annotations

import getpass
import logging
import math
import os
import time
import warnings
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

from composer import Logger, State
from composer.loggers import MLFlowLogger
from composer.utils import dist
from filelock import FileLock
from mlflow.entities import DatasetInput, Metric
from mlflow.exceptions import MlflowException
from mlflow.store.db import utils as db_utils
from sqlalchemy.exc import SQLAlchemyError

from dbrx_train.checkpoint.tracking_uri import sqlite_file
from dbrx_train.config import ConfigError
from dbrx_train.errors import STOPPED, first_line

# A server that does not answer is given up after half a minute, not after MLflow's several: at the start a
# person is waiting, and later training is.
for _key, _value in {"MAX_RETRIES": "2", "TIMEOUT": "10", "BACKOFF_FACTOR": "1"}.items():
    os.environ.setdefault(f"MLFLOW_HTTP_REQUEST_{_key}", _value)
# A database that cannot be opened is tried for 101 s by MLflow, which logs each try, and what it raises.
db_utils.MAX_RETRY_COUNT = 6  # 5.7 s
logging.getLogger(db_utils.__name__).setLevel(logging.CRITICAL)
logging.getLogger("mlflow").setLevel(logging.WARNING)  # its news would break up the progress bar
# The run's address, which the builder says without the credentials that MLflow prints.
os.environ.setdefault("MLFLOW_SUPPRESS_PRINTING_URL_TO_STDOUT", "true")

_log = logging.getLogger(__name__)

STORE_ERRORS = (MlflowException, SQLAlchemyError, OSError)
"""What a tracking store raises when it cannot be used."""


def reason(error: Exception) -> str:
    """What a store says is wrong, in one line."""
    lines = [line for line in str(error).splitlines() if not line.startswith("(raised as a result of")]
    return next(filter(None, lines), first_line(error))


_LOCK_SECONDS = 60.0


@contextmanager
def _alone(uri: str) -> Iterator[None]:
    """One process at a time: two that make an SQLite store's tables or experiment at once fail."""
    file = sqlite_file(uri)
    if file is None or dist.get_global_rank() != 0:
        yield
        return
    file.parent.mkdir(parents=True, exist_ok=True)
    with FileLock(file.with_name(f".{file.name}.lock"), timeout=_LOCK_SECONDS):
        yield


def _user() -> str:
    """Who runs this, as far as the system knows: a container's user may have no name."""
    with suppress(OSError, KeyError):
        return getpass.getuser()
    return f"uid {os.getuid()}"


_FLUSH_SECONDS = 5.0
_LONGEST_WAIT = 300.0  # between tries at a store that fails, each of which training waits for
_LARGEST_BATCH = 1000  # MLflow's own limit per request
_LONGEST_TAG = 5000  # characters, the limit of older servers


class MLflowStore(MLFlowLogger):  # type: ignore[misc]
    """Keeps a run's record without getting in its way.

    - Metrics are written in batches every few seconds: a write per metric costs a small model a tenth of its
      step, and the base's asynchronous mode drops all that follows a conflict.
    - A store that fails for a while (locked, full, out of reach) does not stop the run: its metrics wait, and
      it is tried again ever less often, down to once in five minutes.
    - Parameters keep their first value when a run is resumed with another one, since MLflow refuses to change
      them; what changed is in its tags and its configuration artifacts.
    """

    def __init__(self, *, uri: str, experiment: str, run_name: str, resume: bool) -> None:
        with _alone(uri):
            super().__init__(
                experiment_name=experiment,
                run_name=run_name,
                tags={"mlflow.user": _user(), "mlflow.source.name": "dbrx-train"},
                tracking_uri=uri,
                synchronous=True,
                resume=resume,
                log_system_metrics=True,
            )
        self.end_status = "FINISHED"
        self._recorded_end: str | None = None
        self._pending: list[Metric] = []
        self._wait = _FLUSH_SECONDS
        self._flush_at = time.monotonic() + self._wait

    @property
    def run_id(self) -> str:
        return str(self._run_id)

    @property
    def experiment_id(self) -> str:
        return str(self._experiment_id)

    def log_metrics(self, metrics: dict[str, Any], step: int | None = None) -> None:
        if not self._enabled:
            return
        now = int(time.time() * 1000)
        values = {key: float(value) for key, value in metrics.items()}
        # SQL stores make infinity the largest number there is, which flattens every chart
        finite = {key: math.nan if math.isinf(value) else value for key, value in values.items()}
        self._pending += [Metric(key, value, now, step or 0) for key, value in finite.items()]
        if time.monotonic() >= self._flush_at:
            self.flush()

    def flush(self) -> None:
        """Write what is pending to the store; what cannot be written stays pending."""
        begin, waiting = time.monotonic(), len(self._pending)
        try:
            while self._pending:
                self._mlflow_client.log_batch(self._run_id, metrics=self._pending[:_LARGEST_BATCH])
                del self._pending[:_LARGEST_BATCH]
            _log.debug("%d metrics kept in %.3f s", waiting, time.monotonic() - begin)
            self._wait = _FLUSH_SECONDS
        except STORE_ERRORS as error:
            warnings.warn(f"MLflow: {len(self._pending)} metrics wait ({reason(error)})", stacklevel=1)
            self._wait = min(2 * self._wait, _LONGEST_WAIT)
        self._flush_at = time.monotonic() + self._wait

    def log_hyperparameters(self, hyperparameters: dict[str, Any]) -> None:
        if not self._enabled:
            return
        known = self._mlflow_client.get_run(self._run_id).data.params
        new = {key: value for key, value in hyperparameters.items() if key not in known}
        if new:
            super().log_hyperparameters(new)

    def log_artifact(self, path: Path) -> None:
        if self._enabled:
            self._mlflow_client.log_artifact(self._run_id, str(path))

    def log_inputs(self, datasets: Sequence[DatasetInput]) -> None:
        """Log those that the run has not yet, by name and digest."""
        if not self._enabled:
            return
        inputs = self._mlflow_client.get_run(self._run_id).inputs
        known = {(each.dataset.name, each.dataset.digest) for each in inputs.dataset_inputs}
        new = [each for each in datasets if (each.dataset.name, each.dataset.digest) not in known]
        if new:
            self._mlflow_client.log_inputs(self._run_id, new)

    def metric_history(self, key: str) -> list[tuple[int, float]]:
        """(step, value) of one metric over the whole run; of steps that were taken again, the latest."""
        self.flush()
        found = self._mlflow_client.get_metric_history(self._run_id, key)
        return sorted({m.step: m.value for m in sorted(found, key=lambda m: m.timestamp)}.items())

    def set_tag(self, key: str, value: str) -> None:
        if self._enabled:
            self._mlflow_client.set_tag(self._run_id, key, value[:_LONGEST_TAG])

    def metric_names(self) -> list[str]:
        self.flush()
        return sorted(self._mlflow_client.get_run(self._run_id).data.metrics)

    def init(self, state: State, logger: Logger) -> None:
        try:
            super().init(state, logger)
        except STORE_ERRORS as error:
            raise ConfigError(
                f"logging.mlflow_uri: {self.tracking_uri} takes no run ({reason(error)})"
            ) from None

    def eval_end(self, state: State, logger: Logger) -> None:
        if self._wait == _FLUSH_SECONDS:
            self.flush()

    def fit_end(self, state: State, logger: Logger) -> None:
        self.flush()

    def ends_with(self, code: int) -> None:
        """Take the run's status, to be recorded when the store is closed, from the process' exit code."""
        stopped = code == STOPPED or code >= 128  # as of a process that a signal ended
        self.end_status = "KILLED" if stopped else "FAILED" if code else "FINISHED"

    def end(self, code: int) -> None:
        """Record how the run ended; for a process that ends without closing its Trainer."""
        self.ends_with(code)
        self.post_close()

    def post_close(self) -> None:
        took_run = self._enabled and self._run_id is not None
        if not took_run or self._recorded_end == self.end_status:  # Composer closes again as Python ends
            return
        self.flush()
        try:
            super().post_close()
            # The base knows no interruption.
            self._mlflow_client.set_terminated(self._run_id, status=self.end_status)
            self._recorded_end = self.end_status
        except STORE_ERRORS as error:
            warnings.warn(f"MLflow: the run's end is not recorded ({reason(error)})", stacklevel=1)
