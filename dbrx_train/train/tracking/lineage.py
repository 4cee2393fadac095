"""Sources of a run as MLflow's datasets, and the runs that read a source, as MLflow knows them."""

from __future__ import annotations

import json
import os
import shutil
import warnings
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import mlflow
from mlflow.entities import Dataset, DatasetInput, InputTag
from mlflow.exceptions import MlflowException
from sqlalchemy.exc import SQLAlchemyError

from dbrx_train.checkpoint.lineage import KEPT, shards_of
from dbrx_train.checkpoint.tracking_uri import sqlite_file
from dbrx_train.config import RunConfig
from dbrx_train.data.inputs import lists_of
from dbrx_train.data.manifest import digest, fetch, read_manifest
from dbrx_train.data.mds import IndexEntry, fingerprint
from dbrx_train.errors import first_line, seen_from
from dbrx_train.files import atomic_write

if TYPE_CHECKING:
    from dbrx_train.train.tracking.mlflow import MLflowStore

__all__ = ["Reader", "datasets", "keep_lists", "log_sources", "runs_that_read"]

_PAGE = 200


def datasets(config: RunConfig, facts: dict[str, dict[str, Any]]) -> list[DatasetInput]:
    """A run's sources; ``facts`` are ``source_facts``. The digest of each is that of its manifest."""
    found = []
    for name, source in config.data.sources.items():
        manifest, about = read_manifest(source.local), facts[name]
        shards = shards_of(Path(source.local))
        split = manifest.splits["train"]
        profile = {
            "tokens": split.tokens,
            "samples": split.samples,
            "documents": split.documents,
            "seq_len": manifest.seq_len,
            "shards": len(shards),
            "fingerprint": fingerprint(shards),
            **{key: about[key] for key in ("governance", "inputs", "curation")},
        }
        recipes = [each["recipe"] or each["xxh3"] for each in about["curation"]]
        tags = {"mlflow.data.context": "training", "source": name, **about["governance"]}
        tags |= {"recipe": ", ".join(recipes)} if recipes else {}
        dataset = Dataset(
            name,
            about["manifest"],
            "s3" if about["folder"].startswith("s3://") else "local",
            json.dumps({"uri": about["folder"]}),
            profile=json.dumps(profile),
        )
        found.append(DatasetInput(dataset, [InputTag(key, str(value)) for key, value in tags.items()]))
    return found


def log_sources(config: RunConfig, store: MLflowStore, facts: dict[str, dict[str, Any]]) -> None:
    """Log each source once, however often the run goes on; one that has changed since, once more."""
    store.log_inputs(datasets(config, facts))


def keep_lists(config: RunConfig, facts: dict[str, dict[str, Any]]) -> None:
    """Copy what says where each source came from into the run's folder, since sources move and go.

    What cannot be had is a warning.
    """
    for name, source in config.data.sources.items():
        manifest = read_manifest(source.local)
        home = Path(config.folder, KEPT, facts[name]["manifest"])
        for file in lists_of(manifest.inputs, manifest.curation):
            if (home / file).exists():
                continue
            try:
                if source.remote is not None:
                    fetch(os.path.join(source.remote, file), home / file)
                else:
                    home.mkdir(parents=True, exist_ok=True)
                    with atomic_write(home / file) as partial:
                        shutil.copyfile(Path(source.local, file), partial)
            except (OSError, ValueError) as error:
                warnings.warn(f"data.sources.{name}: {file} is not kept ({first_line(error)})", stacklevel=1)


@dataclass(frozen=True)
class Reader:
    """A run of a tracking store that read a source."""

    run_name: str
    run_id: str
    source: str
    """What it called it."""
    tokens: list[tuple[int, int]]
    """(step, tokens of the source seen by it), where that was logged."""

    def __str__(self) -> str:
        seen = "no count of tokens was logged yet"
        if self.tokens:
            seen = "{1:,} tokens by step {0:,}".format(*self.tokens[-1])
        return f"run {self.run_name} ({self.run_id}), as {self.source}: {seen}"


def runs_that_read(uri: str, folder: Path, shards: Sequence[IndexEntry]) -> Iterator[Reader]:
    """The runs in a tracking store that logged a source with these shards, or their first ones, as theirs.

    Raises:
        ValueError: the store cannot be read.
    """
    file = sqlite_file(uri)
    if file is not None and not file.is_file():
        raise ValueError(f"--tracking-uri: {uri}: no such file{seen_from(file)}")
    known = digest(folder)
    try:
        client = mlflow.MlflowClient(uri)
        for run in _runs(client):
            for each in run.inputs.dataset_inputs:
                if each.dataset.digest == known or _holds(each.dataset.profile, shards):
                    yield _reader(client, run, each.dataset.name)
    except (MlflowException, SQLAlchemyError, OSError) as error:
        raise ValueError(f"--tracking-uri: {uri} cannot be read ({first_line(error)})") from None


def _runs(client: mlflow.MlflowClient) -> Iterator[Any]:
    experiments = [each.experiment_id for each in client.search_experiments()]
    token = None
    while True:
        page = client.search_runs(
            experiments, order_by=["start_time ASC"], max_results=_PAGE, page_token=token
        )
        yield from page
        if not (token := page.token):
            return


def _holds(profile: str | None, shards: Sequence[IndexEntry]) -> bool:
    """Whether a source that was logged so is the first of these shards."""
    try:
        known = json.loads(profile or "{}")
        count = known["shards"]
        return bool(count <= len(shards) and known["fingerprint"] == fingerprint(shards[:count]))
    except (ValueError, KeyError, TypeError):
        return False


def _reader(client: mlflow.MlflowClient, run: Any, source: str) -> Reader:
    history = client.get_metric_history(run.info.run_id, f"mix/{source}/tokens")
    by_step = {m.step: int(m.value) for m in sorted(history, key=lambda m: m.timestamp)}
    name = run.data.tags.get("run_name", run.info.run_name)
    return Reader(name, run.info.run_id, source, sorted(by_step.items()))
