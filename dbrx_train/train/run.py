"""The run: from a RunConfig to a trained model, and to a line that says where the results are."""

from __future__ import annotations

import signal
import warnings
from collections.abc import Callable, Sequence
from contextlib import ExitStack
from functools import partial
from pathlib import Path

import torch
from composer import Callback, Trainer
from composer.utils import dist

from dbrx_train.checkpoint import folder as folders
from dbrx_train.checkpoint.adapter import check_base
from dbrx_train.checkpoint.folder import Checkpoint
from dbrx_train.checkpoint.lineage import Lineage
from dbrx_train.checkpoint.registry import is_reference, resolve
from dbrx_train.checkpoint.remote import Remote
from dbrx_train.checkpoint.remote_lease import RemoteLease
from dbrx_train.checkpoint.tensors import Reader, model_tensors
from dbrx_train.checkpoint.weights import read_together
from dbrx_train.config import ConfigError, RunConfig, flatten, for_record, naming
from dbrx_train.data.tokenizer import load_tokenizer
from dbrx_train.errors import STOPPED, exit_code, first_line, show
from dbrx_train.exits import warn_of_failure
from dbrx_train.files import atomic_write
from dbrx_train.jsonl import EVENTS
from dbrx_train.lease import Lease
from dbrx_train.parallel.gather import gather_objects
from dbrx_train.plan.world import check_world
from dbrx_train.resilience import Heartbeat, StoppedTogether, propagate_failures
from dbrx_train.resilience.preemption import PreemptionHandler, cause
from dbrx_train.train import environment, rollback
from dbrx_train.train.allocator import keep_freed_memory
from dbrx_train.train.callbacks.ancestry import Ancestry
from dbrx_train.train.callbacks.checkpoints import Checkpoints
from dbrx_train.train.callbacks.heartbeat import HeartbeatCallback
from dbrx_train.train.callbacks.order import Supervision
from dbrx_train.train.callbacks.preemption import Preemption
from dbrx_train.train.callbacks.tasks import task_benchmark
from dbrx_train.train.environment import print_rank0
from dbrx_train.train.fits import check_fits
from dbrx_train.train.reference import set_reference
from dbrx_train.train.resume import (
    check_folder,
    check_start,
    checkpoint_folder,
    newest,
    open_remote,
    take_leases,
)
from dbrx_train.train.sources import check_sources
from dbrx_train.train.startup_summary import summary
from dbrx_train.train.throughput import peak_flops
from dbrx_train.train.tracking import events, plots
from dbrx_train.train.tracking.description import description
from dbrx_train.train.tracking.installed import check_trackers
from dbrx_train.train.tracking.lineage import keep_lists, log_sources
from dbrx_train.train.tracking.mlflow import STORE_ERRORS, MLflowStore, reason
from dbrx_train.train.tracking.provenance import source_facts
from dbrx_train.train.tracking.starts import CONFIG, keep_configuration
from dbrx_train.train.train_state import callback_of, model_of, restore
from dbrx_train.train.trainer import build_trainer


def run(config: RunConfig, own: Sequence[Callback] = ()) -> None:
    """Train as ``config`` says, from the newest checkpoint of the same run name if there is one.

    ``own``: Composer's callbacks and loggers beside the run's, called after these, and not saved.

    Raises:
        ConfigError: the configuration does not fit the data, the machine or the saved run.
    """
    device = _device(config)
    if device == "cpu":
        keep_freed_memory()
    with PreemptionHandler(config.preemption.seconds, config.stop_after_seconds) as stop, ExitStack() as last:
        _at_exit(last, "how to go on is not known", lambda error: _say_how_to_go_on(config, stop, error))
        with stop.before_training():
            environment.join_ranks(device, config.parallelism.timeout)
        _train(config, device, stop, own)


def _train(config: RunConfig, device: str, stop: PreemptionHandler, own: Sequence[Callback]) -> None:
    heartbeat, stacks = Heartbeat(), Path(config.folder) / "stacks"
    with (
        ExitStack() as afterwards,
        propagate_failures(show, heartbeat, stacks) as ending,
        stop.before_training(),
    ):
        stop.tell = ending.tell
        _resolve_weights(config)
        check_world(config, dist.get_world_size())
        check_fits(config, device)
        check_trackers(config)
        tokenizer = load_tokenizer(config.tokenizer.name, config.tokenizer.vocab_file)
        check_sources(config, tokenizer)
        task_benchmark(config, tokenizer)
        check_folder(config)
        remote, leases = open_remote(config), list[Lease | RemoteLease]()
        if dist.get_global_rank() == 0:
            leases = [*take_leases(config, remote, afterwards, lost=lambda what: ending.tell(what, 1))]
        found = newest(config, remote)
        weights = check_start(config, found)
        if found and found.tokens >= config.clock.total_tokens:
            end = f"{found.folder} holds its end"
            print_rank0(f"{config.run_name} is done: {end}. A larger max_duration= continues it.")
            return
        store = _open_store(config, resume=found is not None)
        ending.at_end = store.end
        peak, origin = peak_flops(device, config.precision, config.logging.peak_flops)
        supervision = Supervision(HeartbeatCallback(heartbeat, *config.watchdog.seconds), stop, leases)
        trainer = build_trainer(config, tokenizer, device, store, peak, remote, supervision, own)
        stopping = callback_of(trainer.state, Preemption)
        at_exit = partial(_at_exit, afterwards)
        at_exit("ranks did not meet", lambda error: _meet(stopping, error))
        # Trainer.close waits for all ranks, of which some may have failed.
        at_exit("not all was closed", lambda error: (trainer if error is None else trainer.engine).close())
        at_exit(f"MLflow does not keep {EVENTS}", lambda _: _keep_events(config, store))
        base = config.init_from.path if config.lora.rank is not None else None
        at_exit("MLflow is not told how it ended", lambda error: store.ends_with(exit_code(error)))
        try:
            if weights:
                with naming("init_from.path: "):
                    read_together(weights, model_of(trainer.state))
                base_weights = weights.lineage or Lineage(str(weights.path.absolute()))
                callback_of(trainer.state, Ancestry).base = base_weights
            if found:
                print_rank0(f"{config.run_name} goes on from {found.folder}, after {found.tokens:,} tokens")
                events.record(Path(config.folder), "resumed", step=found.step, tokens=found.tokens)
                resume(trainer, found, remote, base)
            if config.preferences.beta is not None:
                set_reference(config, trainer, tokenizer, made=found is not None)
            _record(config, store, f"{peak:.4g} FLOP/s, {origin}", found)
            print_rank0(summary(config, device, dist.get_world_size()))
            if config.evaluation.at_start and found is None and trainer.state.evaluators:
                trainer.eval()
            rollback.fit(
                trainer,
                Path(config.folder),
                newest=lambda last: newest(config, remote, last),
                resume=lambda checkpoint: resume(trainer, checkpoint, remote, base),
            )
            if dist.get_global_rank() == 0:
                _report(config, store, trainer.state.timestamp.batch.value)
        except SystemExit:  # of a signal before the first step, or once all is saved
            callback_of(trainer.state, Checkpoints).finish()
            raise


def _resolve_weights(config: RunConfig) -> None:
    """Put the folder in place of a registered model's name, which rank 0 asks the registry for."""
    path = config.init_from.path
    if path is not None and is_reference(path):
        found = None
        if dist.get_global_rank() == 0:
            with naming("init_from.path: "):
                found = str(resolve(Path(path), config.logging.mlflow_uri))
        config.init_from.path = gather_objects(found)[0]


def _at_exit(stack: ExitStack, trouble: str, action: Callable[[BaseException | None], object]) -> None:
    """Have a stack do something, told of the error that the run ends with, which stays that if this fails."""

    def close(_: object, error: BaseException | None, __: object) -> None:
        with warn_of_failure(trouble):
            action(error)

    stack.push(close)


def _meet(stopping: Preemption, error: BaseException | None) -> None:
    if isinstance(error, StoppedTogether):
        stopping.meet()


def _say_how_to_go_on(config: RunConfig, stop: PreemptionHandler, error: BaseException | None) -> None:
    """The last line of a run that was stopped."""
    if exit_code(error) in (STOPPED, 128 + signal.SIGINT):
        saved = next(iter(folders.saved(checkpoint_folder(config))), None)
        why = f" ({cause(stop.asked())})" if stop.asked() else ""
        where = saved or "the beginning: nothing was saved yet"
        print_rank0(f"stopped{why}; the same command goes on from {where}")


def resume(
    trainer: Trainer, checkpoint: Checkpoint, remote: Remote | None = None, base: str | None = None
) -> None:
    """Put a Trainer where ``checkpoint`` was saved; files that are not there come from ``remote``.

    ``base``: where the weights come from that the Trainer's model has beside its adapters, if it has any.

    Raises:
        ConfigError: the adapters are of other weights.
    """

    def fetch(name: str) -> None:
        if remote is not None:
            remote.fetch(checkpoint, name)

    reader = Reader(checkpoint.folder, fetch)
    if base is not None:
        with naming("init_from.path: "):
            check_base(reader, model_tensors(model_of(trainer.state)), base)
    restore(trainer, checkpoint, reader)


def _device(config: RunConfig) -> str:
    if config.device == "gpu" and not torch.cuda.is_available():
        raise ConfigError("device: gpu, but torch finds no CUDA GPU on this machine; use cpu or auto")
    device = {"auto": "gpu" if torch.cuda.is_available() else "cpu"}.get(config.device, config.device)
    if config.profile.memory and device == "cpu":
        raise ConfigError("profile.memory: is of a GPU, and this run is on a CPU")
    return device


def _open_store(config: RunConfig, *, resume: bool) -> MLflowStore:
    """Raises ConfigError if the tracking URI cannot be used."""
    uri = config.logging.mlflow_uri
    try:
        return MLflowStore(
            uri=uri, experiment=config.logging.experiment, run_name=config.run_name, resume=resume
        )
    except STORE_ERRORS as error:
        raise ConfigError(f"logging.mlflow_uri: {uri} cannot be used ({reason(error)})") from None


def _record(config: RunConfig, store: MLflowStore, peak: str, found: Checkpoint | None) -> None:
    """Keep the configuration with the run, what of it changed since the start before, and the environment."""
    if dist.get_global_rank() != 0:
        return
    folder = Path(config.folder)
    changed = keep_configuration(config, folder)
    path, step, tokens = folder / CONFIG, found.step if found else 0, found.tokens if found else 0
    if changed:
        said = ", ".join(f"{key} {was} -> {now}" for key, (was, now) in changed.items())
        print_rank0(f"changed since the last start: {said}")
        events.record(folder, "configuration", step=step, tokens=tokens, changed=changed)
    facts = (
        {key: str(value) for key, value in flatten(for_record(config))}
        | environment.describe()
        | {
            "mfu.formula": "(6*active_params_without_embedding + 12*n_layers*d_model*seq_len)*tokens/s/peak",
            "mfu.peak": peak,
            "model.num_params": config.model.num_params,
            "model.num_active_params": config.model.num_active_params,
        }
    )
    sources = source_facts(config)
    keep_lists(config, sources)
    try:
        store.log_hyperparameters(facts)
        store.log_artifact(path)
        log_sources(config, store, sources)
        store.set_tag("mlflow.note.content", description(config, dist.get_world_size()))
        if changed:
            store.set_tag(f"configuration.step{step}", said)
    except STORE_ERRORS as error:
        warnings.warn(
            f"MLflow: configuration and sources are not recorded, but in {folder} ({first_line(error)})",
            stacklevel=1,
        )


def _report(config: RunConfig, store: MLflowStore, batch: int) -> None:
    """Draw the run, and say how it went and where it is; it ended, and was saved, at step ``batch``."""
    with warn_of_failure("no picture of the run, or its last figures"):
        if store.metric_history("loss/train/total"):  # else the store is out of reach, and has none
            path = Path(config.folder) / "training.png"
            with atomic_write(path) as partial:
                plots.draw(store, config.clock, partial)
            store.log_artifact(path)
        for source, points in plots.held_out_losses(store).items():
            (begin, first), (step, last) = points[0], points[-1]
            before = f"{first:.3f} after {_tokens(config, begin)}, " if len(points) > 1 else ""
            print_rank0(f"held-out {source}: loss {before}{last:.3f} after {_tokens(config, step)}")
    print_rank0(f"checkpoint: {checkpoint_folder(config)}/ba{batch}")
    uri = config.logging.mlflow_uri
    page = f"#/experiments/{store.experiment_id}/runs/{store.run_id}"
    if uri.startswith(("http://", "https://")):
        print_rank0(f"run {store.run_id}: {uri.rstrip('/')}/{page}")
    else:
        print_rank0(
            f"run {store.run_id}: mlflow ui --backend-store-uri {uri}, then http://127.0.0.1:5000/{page}"
        )


def _keep_events(config: RunConfig, store: MLflowStore) -> None:
    """Have MLflow keep what happened to the run, however it ended."""
    path = Path(config.folder) / EVENTS
    if path.exists():
        store.log_artifact(path)


def _tokens(config: RunConfig, step: int) -> str:
    return f"{int(config.clock.convert(step, 'ba', 'tok')):,} tokens"
