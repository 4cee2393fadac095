"""What a run left: its configuration, its metrics in MLflow, its events."""

from __future__ import annotations

from collections.abc import Iterable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import mlflow
from mlflow.exceptions import MlflowException
from sqlalchemy.exc import SQLAlchemyError

from dbrx_train import jsonl
from dbrx_train.checkpoint.tracking_uri import sqlite_file
from dbrx_train.config import RunConfig, load
from dbrx_train.errors import check_exists, first_line, seen_from
from dbrx_train.redact import MASK

__all__ = ["OBJECTIVES", "Record", "read"]

OBJECTIVES = {"loss/train/cross_entropy": "training", "loss/train/dpo": "training, DPO"}
"""The metrics of what a run may be trained on, and their names in a picture."""
Series = dict[int, float]
"""Step -> value, in the order of steps."""


@dataclass(frozen=True)
class Record:
    config: RunConfig
    run_id: str
    status: str
    started: float
    """Unix seconds."""
    ended: float | None
    params: dict[str, str]
    metrics: dict[str, Series]
    events: list[dict[str, Any]]
    """As in the run's events.jsonl, oldest first."""


def read(folder: Path, uri: str | None = None) -> Record:
    """The record of the run in ``folder``, its metrics from the tracking store at ``uri``.

    ``uri`` defaults to the configuration's. Raises ValueError if there is no such run, or no such store.
    """
    check_exists(folder)
    path = folder / "config.yaml"
    if not path.is_file():
        raise ValueError(f"{folder}: no run's folder, for it has no config.yaml")
    config = load(path)
    uri = uri or config.logging.mlflow_uri
    if MASK in uri:
        raise ValueError(
            f"{path}: its logging.mlflow_uri holds a secret, which is masked; give --tracking-uri"
        )
    _check_file(uri)
    try:
        client = mlflow.MlflowClient(uri)
        found = _run(client, config, uri)
        metrics = _metrics(client, found)
    except (MlflowException, SQLAlchemyError, OSError) as error:
        raise ValueError(
            f"{uri} cannot be read ({first_line(error)}); --tracking-uri names another"
        ) from None
    info = found.info
    return Record(
        config=config,
        run_id=info.run_id,
        status=info.status,
        started=info.start_time / 1000,
        ended=info.end_time / 1000 if info.end_time else None,
        params=dict(found.data.params),
        metrics=metrics,
        events=jsonl.Tail(folder / jsonl.EVENTS).read(),
    )


def _check_file(uri: str) -> None:
    """Opening an SQLite store that is not there would make one."""
    file = sqlite_file(uri)
    if file is not None and not file.is_file():
        raise ValueError(f"{uri}: no such file{seen_from(file)}; --tracking-uri names the run's MLflow store")


def _run(client: mlflow.MlflowClient, config: RunConfig, uri: str) -> Any:
    experiment = client.get_experiment_by_name(config.logging.experiment)
    name = config.run_name.replace("'", "\\'")
    found = experiment and client.search_runs(
        [experiment.experiment_id], f"tags.run_name = '{name}'", order_by=["start_time DESC"], max_results=1
    )
    if not found:
        where = f"in experiment {config.logging.experiment}; --tracking-uri names another store"
        raise ValueError(f"{uri}: has no run {config.run_name} {where}")
    return found[0]


def _metrics(client: mlflow.MlflowClient, found: Any) -> dict[str, Series]:
    def history(name: str) -> Series:
        points = client.get_metric_history(found.info.run_id, name)
        # A step that was taken again counts as it was at last.
        return dict(sorted({m.step: m.value for m in sorted(points, key=lambda m: m.timestamp)}.items()))

    names = [name for name in sorted(found.data.metrics) if not name.startswith("system/")]
    with ThreadPoolExecutor(8) as pool:
        histories: Iterable[Series] = pool.map(history, names)
        return dict(zip(names, histories, strict=True))
