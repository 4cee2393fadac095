"""What a run begins with: the newest checkpoint that holds, or weights, and whether they fit it."""

from __future__ import annotations

import heapq
import math
import tempfile
import time
import warnings
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import asdict
from pathlib import Path
from typing import Any

from composer.utils import dist, maybe_create_object_store_from_uri, parse_uri
from omegaconf.errors import OmegaConfBaseException

from dbrx_train.checkpoint import folder as folders
from dbrx_train.checkpoint.folder import Checkpoint
from dbrx_train.checkpoint.remote import Remote
from dbrx_train.checkpoint.remote_lease import RemoteLease
from dbrx_train.checkpoint.selection import select
from dbrx_train.checkpoint.weights import Weights, open_weights, upcycled
from dbrx_train.config import RECORD, ConfigError, RunConfig, flatten, from_dict, naming, to_dict
from dbrx_train.data.tokenizer import load_tokenizer
from dbrx_train.errors import first_line
from dbrx_train.lease import Lease, LeaseHeld
from dbrx_train.model.config import DbrxConfig
from dbrx_train.plan.world import mesh_shape
from dbrx_train.train.data import train_dataset
from dbrx_train.train.environment import print_rank0
from dbrx_train.train.lr_schedule import learning_rate_factor

__all__ = [
    "check_folder",
    "check_start",
    "checkpoint_folder",
    "newest",
    "open_remote",
    "same_tokenizer",
    "take_leases",
]

# What the weights' shapes depend on, and the optimizer's state beside them.
_FIXED_WEIGHTS = (
    "model.norm",
    "model.d_model",
    "model.n_layers",
    "model.n_heads",
    "model.n_kv_heads",
    "model.vocab_size",
    "model.ffn_hidden_size",
    "model.num_experts",
)
_FIXED = (*_FIXED_WEIGHTS, "optimization.optimizer.name", "lora.rank")
_FIXED_ADAPTERS = ("lora.alpha", "lora.targets")
# What the weights were trained with, and may be trained away from.
_USUAL = (
    "model.rope_theta",
    "model.clip_qkv",
    "model.norm_eps",
    "model.top_k",
    "model.normalize_expert_weights",
)


def checkpoint_folder(config: RunConfig) -> Path:
    return Path(config.folder) / "checkpoints"


def check_folder(config: RunConfig) -> None:
    """The run's folder is one that it may write to.

    Raises:
        ConfigError: it holds a configuration that no run wrote, and that the run would overwrite.
    """
    folder = Path(config.folder)
    given = folder / "config.yaml"
    traces = ("checkpoints", "events.jsonl", "time.jsonl")  # of runs that did not yet say whose it is
    if given.is_file() and not any((folder / name).exists() for name in traces):
        with given.open(encoding="utf-8", errors="replace") as file:
            if file.readline() != RECORD:
                raise ConfigError(
                    f"folder: {given} is not a run's, and the run would overwrite it; give the run a folder "
                    f"of its own"
                )


def check_start(config: RunConfig, found: Checkpoint | None) -> Weights | None:
    """What the run begins with, before anything is touched; returns weights that it is to begin with, if any.

    Raises:
        ConfigError: the saved run, the weights, the data or the disk do not fit.
    """
    weights = None
    if found and config.checkpoints.remote is not None:
        _check_same(("run_name",), config, found.folder, found.config, "; a store is one run's alone")
    if found:
        fixed = _FIXED if config.lora.rank is None else (*_FIXED, *_FIXED_ADAPTERS)
        _check_same(
            fixed, config, found.folder, found.config, "; give the run another run_name= to start afresh"
        )
    if config.init_from.path is not None and (found is None or config.lora.rank is not None):
        with naming("init_from.path: "):
            weights = open_weights(Path(config.init_from.path), print_rank0)
        weights = _fitting(config, weights)
    _check_mix(config, found)
    if found:
        _warn_of_learning_rate(config, found)
    checkpoint_folder(config).mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryFile(dir=config.folder):
        pass  # a read-only or full disk is found out here
    return weights


def _warn_of_learning_rate(config: RunConfig, found: Checkpoint) -> None:
    """Say so if the learning rate jumps where the run goes on."""
    try:
        before = from_dict(found.config)
    except (ValueError, OmegaConfBaseException):  # saved by a version with other keys
        return
    was, now = (_learning_rate(each, found.tokens) for each in (before, config))
    if not math.isclose(was, now, rel_tol=0.01):
        warnings.warn(
            f"the learning rate goes on with {now:.2e}, where {found.folder} would have had {was:.2e}: "
            f"max_duration or optimization changed what it was to be; with schedule constant or inverse_sqrt "
            f"and a decay, a longer run has the same past",
            stacklevel=1,
        )


def _learning_rate(config: RunConfig, tokens: int) -> float:
    """The largest of all parameter groups' at ``tokens`` of the run, or at its end if that comes before."""
    optimization, clock = config.optimization, config.clock
    last = max(0, clock.total_tokens - 1)
    factor = learning_rate_factor(optimization.learning_rate, clock, min(tokens, last))
    return optimization.optimizer.lr * factor


def _fitting(config: RunConfig, weights: Weights) -> Weights:
    """The weights to begin the run with.

    Raises:
        ConfigError: they are of another model.
    """
    upcycle = config.init_from.upcycle
    fixed = [key for key in _FIXED_WEIGHTS if not upcycle or key != "model.num_experts"]
    _check_same(fixed, config, weights.path, weights.config)
    was, now = weights.model.to_dict(), config.model.to_dict()
    for key in (key.removeprefix("model.") for key in _USUAL):
        if now[key] != was[key] and not (upcycle and key in ("top_k", "normalize_expert_weights")):
            warnings.warn(
                f"model.{key}: {now[key]} here, but {was[key]} in {weights.path}; the model will not compute "
                f"what its weights were trained for",
                stacklevel=1,
            )
    ours, theirs = asdict(config.tokenizer), weights.config["tokenizer"]
    if not same_tokenizer(ours, theirs, weights.tokenizer_fingerprint):
        warnings.warn(
            f"tokenizer: {ours} here, but that of {weights.path} is {theirs or 'not known'}; ids must mean "
            f"what its weights were trained for",
            stacklevel=1,
        )
    with naming("init_from.upcycle: "):
        return upcycled(weights, config.model) if upcycle else weights


def same_tokenizer(one: dict[str, Any], other: dict[str, Any] | None, fingerprint: str | None = None) -> bool:
    """Whether two tokenizers, as configured, give the same ids.

    ``fingerprint``: of the other, as it was when that was used; its file may hold something else by now.
    """
    if fingerprint is None and (other is None or one == other):
        return one == other
    try:  # a file may hold what goes by the usual name
        known = load_tokenizer(**(other or {})).fingerprint if fingerprint is None else fingerprint
        return load_tokenizer(**one).fingerprint == known
    except ValueError:
        return False


def newest(config: RunConfig, remote: Remote | None, last: float = math.inf) -> Checkpoint | None:
    """The checkpoint to go on from, the same on every rank: the newest that verifies, here or there.

    Of step ``last`` at most.
    """
    root = checkpoint_folder(config)
    if dist.get_global_rank() == 0:
        folders.finish_commit(root)

    def there() -> Iterator[Checkpoint]:
        if remote is not None:
            with _store_errors(config.checkpoints.remote):
                yield from remote.whole(root, print_rank0)

    def fetch(checkpoint: Checkpoint, name: str) -> None:
        if remote is not None:
            remote.fetch(checkpoint, name)

    newest_first = heapq.merge(folders.whole(root, print_rank0), there(), key=lambda found: -found.step)
    begin = time.monotonic()
    # Of what is fetched one replica has need, the first.
    readers = None if remote is None else mesh_shape(config, dist.get_world_size()).shard
    found = select((each for each in newest_first if each.step <= last), fetch, print_rank0, readers)
    if found is not None:
        print_rank0(
            f"{found.folder}: {found.bytes:,} bytes are as written, read in {time.monotonic() - begin:.1f} s"
        )
    return found


def open_remote(config: RunConfig) -> Remote | None:
    """Where checkpoints are copied to.

    Raises:
        ConfigError: there is no such store.
    """
    uri = config.checkpoints.remote
    if uri is None:
        return None
    with _store_errors(uri):
        store, (*_, prefix) = maybe_create_object_store_from_uri(uri), parse_uri(uri)
    if store is None:
        raise ConfigError(f"checkpoints.remote: {uri} is no URL of an object store, such as s3://bucket/run")
    return Remote(store, prefix)


def take_leases(
    config: RunConfig, remote: Remote | None, stack: ExitStack, lost: Callable[[str], None]
) -> Iterator[Lease | RemoteLease]:
    """The leases of the run's folder and of its place on an object store, held until ``stack`` is closed.

    Raises:
        ValueError: another process holds one of them, or the store cannot be used.
    """
    yield stack.enter_context(Lease(Path(config.folder), lost=lost, say=print_rank0))
    if remote is not None:
        uri = config.checkpoints.remote
        lease = RemoteLease(*remote.place, f"checkpoints.remote: {uri}", lost=lost, say=print_rank0)
        with _store_errors(uri):
            yield stack.enter_context(lease)


@contextmanager
def _store_errors(uri: str | None) -> Iterator[None]:
    try:
        yield
    except LeaseHeld:
        raise
    except Exception as error:  # every kind of store has its own
        raise ConfigError(f"checkpoints.remote: {uri} cannot be used ({first_line(error)})") from None


def _check_same(
    keys: Sequence[str], config: RunConfig, path: Path, saved: dict[str, Any], advice: str = ""
) -> None:
    model = DbrxConfig.from_dict(saved["model"]).to_dict()  # older ones lack newer options
    was, now = dict(flatten(saved | {"model": model})), dict(flatten(to_dict(config)))
    for key in keys:
        if now[key] != was.get(key):
            raise ConfigError(f"{key}: {now[key]} here, but {path} was saved with {was.get(key)}{advice}")


def _check_mix(config: RunConfig, saved: Checkpoint | None) -> None:
    """What only the data and the saved run can tell, before anything is touched.

    Raises:
        ValueError: a source is repeated too often, or the mix's past is not that of the saved run.
    """
    dataset = train_dataset(config)
    if saved:
        dataset.load_state_dict(saved.metadata["data"])
    config.check_repetition(dataset.schedule, dataset.sizes)
