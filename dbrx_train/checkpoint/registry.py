"""MLflow's model registry: checkpoints registered by reference, and found again by ``models:/name@alias``.

What is registered is a card of a few kilobytes, an MLflow model whose one file says where the checkpoint
lies, by which hash of its manifest it is known, and what it was trained on. No weights are copied, and a card
is what every kind of registry takes: MLflow's own, in a file or behind a server, and Unity Catalog.
"""

from __future__ import annotations

import json
import logging
import os
import re
import shlex
import tempfile
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager, redirect_stderr
from dataclasses import asdict, dataclass
from io import StringIO
from pathlib import Path
from typing import Any

import xxhash

from dbrx_train import __version__
from dbrx_train.checkpoint import folder as folders
from dbrx_train.checkpoint.lineage import Lineage, describe, of_checkpoint
from dbrx_train.checkpoint.tracking_uri import sqlite_file
from dbrx_train.config.sections import LoggingConfig
from dbrx_train.errors import check_exists, first_line, seen_from
from dbrx_train.redact import MASK

__all__ = ["CARD", "Card", "Registered", "is_reference", "register", "resolve"]

CARD = "card.json"
LOADER = "dbrx_train.evaluate.registered"
"""The module by which MLflow itself loads a card."""
OPTIONS: tuple[tuple[str, str, Any], ...] = (
    ("max_new_tokens", "long", 128),
    ("temperature", "double", 0.0),
    ("top_p", "double", 1.0),
    ("seed", "long", 0),
    ("chat", "boolean", False),
)
"""How to write, for those that MLflow loads: name, type and default."""
_REFERENCE = re.compile(r"models:/+([^@/]+)(?:@([\w.-]+)|/(\d+))")
_HELD_OUT = re.compile(r"metrics/eval/.+/cross_entropy|loss/train/(cross_entropy|dpo)")


@dataclass(frozen=True)
class Card:
    """What is registered of a checkpoint."""

    weights: str
    """The checkpoint's folder, absolute."""
    remote: str | None
    """The object store that its run copied it to."""
    manifest: str
    """XXH3 of the checkpoint's manifest, which has the hash of every file."""
    bytes: int
    licence: str | None
    metrics: dict[str, float]
    """Training and held-out loss, the latest by its step."""
    lineage: dict[str, Any]
    made_by: str = f"dbrx-train {__version__}"


@dataclass(frozen=True)
class Registered:
    """A version of a registered model."""

    name: str
    version: str
    alias: str | None
    card: Card

    @property
    def reference(self) -> str:
        return f"models:/{self.name}" + (f"@{self.alias}" if self.alias else f"/{self.version}")

    def __str__(self) -> str:
        lineage = Lineage.from_dict(self.card.lineage)
        alias = f", {self.alias}" if self.alias else ""
        where = f"run {lineage.run}, step {lineage.step:,}, {self.card.bytes:,} bytes where they were"
        return f"{self.name} version {self.version}{alias}: {where}\n{self.command}"

    @property
    def command(self) -> str:
        """What loads it."""
        return f"dbrx-train generate {shlex.quote(self.reference)} PROMPT"


def register(
    path: Path,
    name: str,
    on_skip: Callable[[str], None],
    *,
    alias: str | None = None,
    licence: str | None = None,
    tracking_uri: str | None = None,
    registry_uri: str | None = None,
) -> Registered:
    """Register a run's newest checkpoint, or a checkpoint, as the next version of a model.

    A registered checkpoint is not pruned by its run.

    Args:
        path: the run or the checkpoint.
        name: the model's; of Unity Catalog's, ``catalog.schema.model``.
        on_skip: hears of checkpoints that are passed over.
        alias: one that this version takes over.
        licence: of the model.
        tracking_uri: the store that knows the run; default: its configuration's.
        registry_uri: where to register; default: ``MLFLOW_REGISTRY_URI``, or ``tracking_uri``.

    Raises:
        ValueError: there is no such checkpoint or run, or the registry does not take it.
    """
    check_exists(path)
    held = folders.hold_newest(path, on_skip)
    if held is None:
        raise ValueError(f"{path}: neither a run with checkpoints nor a checkpoint")
    checkpoint, hold = held
    with hold:
        config = checkpoint.config
        tracking = tracking_uri or config.get("logging", {}).get("mlflow_uri", LoggingConfig.mlflow_uri)
        if MASK in tracking:
            raise ValueError(
                f"--tracking-uri: that of {checkpoint.folder} holds a secret, which is masked; give it"
            )
        registry = registry_uri or os.environ.get("MLFLOW_REGISTRY_URI") or tracking
        _check_file(tracking)
        if alias is not None and registry.startswith("uc:"):
            raise ValueError(f"--alias: {registry} takes none (Unity Catalog's open server); leave it out")
        with _stores(tracking, registry), _refusals(registry):
            run = _run(checkpoint)
            card = _card(checkpoint, licence, _metrics(run, checkpoint.step))
            version = _log(name, card, run, checkpoint.step)
            registered = Registered(name, version, alias, card)
            _annotate(registered, registry)
        folders.keep(checkpoint.folder)
        return registered


def _check_file(uri: str) -> None:
    """Opening an SQLite store that is not there would make one."""
    file = sqlite_file(uri)
    if file is not None and not file.is_file():
        raise ValueError(f"{uri}: no such file{seen_from(file)}; MLFLOW_TRACKING_URI names the store")


@contextmanager
def _stores(tracking: str, registry: str) -> Iterator[None]:
    """MLflow's process-wide addresses, which its models need, while something is done."""
    import mlflow

    # Setting an address sets the variable, too
    before = {key: os.environ.get(key) for key in ("MLFLOW_TRACKING_URI", "MLFLOW_REGISTRY_URI")}
    noise = logging.getLogger("mlflow"), logging.getLogger("alembic")
    levels = [logger.level for logger in noise]
    for logger in noise:
        logger.setLevel(logging.ERROR)
    mlflow.set_tracking_uri(tracking)
    mlflow.set_registry_uri(registry)
    try:
        yield
    finally:
        mlflow.set_tracking_uri(None)
        mlflow.set_registry_uri(None)
        for key, value in before.items():
            os.environ.pop(key, None)
            if value is not None:
                os.environ[key] = value
        for logger, level in zip(noise, levels, strict=True):
            logger.setLevel(level)


@contextmanager
def _refusals(registry: str) -> Iterator[None]:
    """What MLflow raises, as a ValueError of one line."""
    from mlflow.exceptions import MlflowException
    from sqlalchemy.exc import SQLAlchemyError

    try:
        yield
    except (MlflowException, SQLAlchemyError, OSError) as error:
        raise ValueError(f"{registry}: {first_line(error)}") from None


def _run(checkpoint: folders.Checkpoint) -> Any:
    """The run that saved a checkpoint, in the tracking store; None if it is not there."""
    import mlflow

    client, config = mlflow.MlflowClient(), checkpoint.config
    if "run_name" not in config:
        return None
    experiment = client.get_experiment_by_name(config["logging"]["experiment"])
    name = config["run_name"].replace("'", "\\'")
    found = experiment and client.search_runs(
        [experiment.experiment_id], f"tags.run_name = '{name}'", order_by=["start_time DESC"], max_results=1
    )
    return found[0] if found else None


def _metrics(run: Any, step: int) -> dict[str, float]:
    """Losses of a run, each the latest by a step."""
    import mlflow

    if run is None:
        return {}
    client, found = mlflow.MlflowClient(), {}
    for key in filter(_HELD_OUT.fullmatch, run.data.metrics):
        points = [m for m in client.get_metric_history(run.info.run_id, key) if m.step <= step]
        if points:
            found[key] = max(points, key=lambda m: (m.step, m.timestamp)).value
    return found


def _card(checkpoint: folders.Checkpoint, licence: str | None, metrics: dict[str, float]) -> Card:
    content = (checkpoint.folder / folders.MANIFEST).read_bytes()
    remote = checkpoint.config.get("checkpoints", {}).get("remote")
    return Card(
        str(checkpoint.folder.absolute()),
        remote and f"{remote.rstrip('/')}/{checkpoint.folder.name}",
        xxhash.xxh3_128_hexdigest(content),
        checkpoint.bytes,
        licence,
        metrics,
        of_checkpoint(checkpoint).to_dict(),
    )


def _log(name: str, card: Card, run: Any, step: int) -> str:
    """Log the card as a model of the run, and register it; returns the version."""
    import mlflow
    from mlflow.models import Model
    from mlflow.models.signature import ModelSignature
    from mlflow.types import ColSpec, DataType, ParamSchema, ParamSpec, Schema

    options = [ParamSpec(key, DataType[kind], value) for key, kind, value in OPTIONS]
    signature = ModelSignature(
        Schema([ColSpec(DataType.string, "prompt")]),
        Schema([ColSpec(DataType.string)]),
        ParamSchema(options),
    )
    with tempfile.TemporaryDirectory() as folder:
        (Path(folder) / CARD).write_text(json.dumps(asdict(card), indent=1), encoding="utf-8")
        with redirect_stderr(StringIO()), warnings.catch_warnings():  # MLflow's news
            warnings.simplefilter("ignore")
            info = Model.log(
                None,
                mlflow.pyfunc,
                name=re.sub(r"[^\w-]", "-", name),
                registered_model_name=name,
                run_id=run and run.info.run_id,
                step=step,
                loader_module=LOADER,
                data_path=folder,
                signature=signature,
                pip_requirements=[f"dbrx-train[train]=={__version__}"],
            )
    return str(info.registered_model_version)


def _annotate(registered: Registered, registry: str) -> None:
    """Tags, a description and the alias of a version, where the registry has a place for them."""
    import mlflow

    if registry.startswith("uc:"):
        return
    client, card = mlflow.MlflowClient(), registered.card
    name, version, lineage = registered.name, registered.version, Lineage.from_dict(card.lineage)
    tags = {
        "run_name": lineage.run,
        "step": lineage.step,
        "tokens": lineage.tokens,
        "weights": card.weights,
        "manifest": card.manifest,
        "licence": card.licence,
        "data_licences": ", ".join(licences(lineage)),
        "command": registered.command,
        **{key.replace("/", "."): f"{value:.6g}" for key, value in card.metrics.items()},
    }
    for key, value in tags.items():
        if value not in (None, ""):
            client.set_model_version_tag(name, version, key, str(value))
    text = "\n".join(
        ["```", registered.command, "```", "", *(f"    {line}" for line in describe(lineage, 5))]
    )
    client.update_model_version(name, version, text)
    if registered.alias is not None:
        client.set_registered_model_alias(name, registered.alias, version)


def licences(lineage: Lineage) -> list[str]:
    """The licences of all sources that weights have seen, ancestors' included."""
    found = [
        source.governance["licence"]
        for each in lineage.ancestors()
        for source in each.sources
        if source.tokens and "licence" in source.governance
    ]
    return list(dict.fromkeys(found))


def is_reference(path: str | os.PathLike[str]) -> bool:
    """Whether this names a registered model rather than a file or folder."""
    return os.fspath(path).startswith("models:/")


def resolve(path: Path, tracking_uri: str | None = None) -> Path:
    """The weights that ``models:/name@alias`` or ``models:/name/version`` names; any other path as it is.

    The registry is the one at ``MLFLOW_REGISTRY_URI``, ``tracking_uri``, ``MLFLOW_TRACKING_URI``, or the
    default of ``logging.mlflow_uri``, the first that is given.

    Raises:
        ValueError: there is no such model, or its checkpoint is not there, or another one by now.
    """
    if not is_reference(path):
        return path
    if (parts := _REFERENCE.fullmatch(os.fspath(path))) is None:
        raise ValueError(f"{path}: names no model; must be models:/NAME@ALIAS or models:/NAME/VERSION")
    tracking = tracking_uri or os.environ.get("MLFLOW_TRACKING_URI") or LoggingConfig.mlflow_uri
    registry = os.environ.get("MLFLOW_REGISTRY_URI") or tracking
    _check_file(registry)
    with _stores(tracking, registry), _refusals(registry):
        card = _fetch(parts[1], parts[2], parts[3], path)
    weights = Path(card["weights"])
    try:
        content = (weights / folders.MANIFEST).read_bytes()
    except OSError as error:
        copy = f"; its copy is {card['remote']}" if card.get("remote") else ""
        raise ValueError(f"{path}: {weights} cannot be read ({error.strerror}){copy}") from None
    if xxhash.xxh3_128_hexdigest(content) != card["manifest"]:
        raise ValueError(f"{path}: {weights} is another checkpoint than the one that was registered")
    return weights


def _fetch(name: str, alias: str | None, version: str | None, path: Path) -> dict[str, Any]:
    """The card of a version."""
    import mlflow

    if version is None:
        version = mlflow.MlflowClient().get_model_version_by_alias(name, alias).version
    with tempfile.TemporaryDirectory() as folder:
        with redirect_stderr(StringIO()):  # a progress bar, of some kilobytes
            mlflow.artifacts.download_artifacts(f"models:/{name}/{version}", dst_path=folder)
        found = next(Path(folder).rglob(CARD), None)
        if found is None:
            raise ValueError(f"{path}: was not registered by `dbrx-train checkpoint register`")
        card: dict[str, Any] = json.loads(found.read_text(encoding="utf-8"))
        return card
