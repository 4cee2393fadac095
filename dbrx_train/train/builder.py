"""From a RunConfig to a trained model: builds composer.Trainer, runs it, says where the results are."""

from __future__ import annotations

import tempfile
import warnings
from pathlib import Path
from typing import Any

import torch
from composer import Trainer
from composer.callbacks import MemoryMonitor, SpeedMonitor
from composer.utils import dist

from dbrx_train.checkpoint import files
from dbrx_train.config import ConfigError, RunConfig, first_line, flatten, to_dict, to_yaml
from dbrx_train.data.tokenizer import Tokenizer, load_tokenizer
from dbrx_train.model.decoder import Dbrx
from dbrx_train.parallel import MeshShape, parallelize
from dbrx_train.train import environment, report
from dbrx_train.train.callbacks.checkpoints import Checkpoints
from dbrx_train.train.callbacks.expert_load import ExpertLoad
from dbrx_train.train.callbacks.gradients import GradientNorm
from dbrx_train.train.callbacks.learning_rate import LearningRate
from dbrx_train.train.callbacks.memory import PeakMemory
from dbrx_train.train.callbacks.mix import MixServed
from dbrx_train.train.callbacks.progress import Progress
from dbrx_train.train.composer_model import ComposerDbrx
from dbrx_train.train.loaders import check_sources, evaluators, samples_of, train_data, train_dataset
from dbrx_train.train.mlflow_store import STORE_ERRORS, MLflowStore
from dbrx_train.train.optimizers import build_optimizer
from dbrx_train.train.throughput import peak_flops

# What a checkpoint's tensors depend on; other keys may change when a run goes on.
_FIXED = (
    "model.d_model",
    "model.n_layers",
    "model.n_heads",
    "model.n_kv_heads",
    "model.vocab_size",
    "model.ffn_hidden_size",
    "model.num_experts",
    "optimization.optimizer.name",
)


def run(config: RunConfig) -> None:
    """Train as ``config`` says, from the newest checkpoint of the same run name if there is one.

    Raises:
        ConfigError: the configuration does not fit the data, the machine or the saved run.
    """
    device = _device(config)
    check_world(config, dist.get_world_size())
    tokenizer = load_tokenizer(config.tokenizer.name, config.tokenizer.vocab_file)
    check_sources(config, tokenizer)
    found = files.newest(checkpoint_folder(config), _say)
    if found:
        _check_same_model(config, *found)
        if files.tokens_done(found[1]) >= config.clock.total_tokens:
            _say(f"{config.run_name} is done: {found[0]} holds its end. A larger max_duration= continues it.")
            return
    _check_mix(config, found[1] if found else None)
    checkpoint_folder(config).mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryFile(dir=config.folder):
        pass  # a read-only or full disk is found out here
    environment.join_ranks(device, config.parallelism.timeout)
    store = _open_store(config, resume=found is not None)
    peak, origin = peak_flops(device, config.precision, config.logging.peak_flops)
    trainer = build_trainer(config, tokenizer, device, store, peak, found[0] if found else None)
    try:
        _record(config, store, f"{peak:.4g} FLOP/s, {origin}")
        if config.evaluation.at_start and found is None and trainer.state.evaluators:
            trainer.eval()
        trainer.fit()
        if dist.get_global_rank() == 0:
            _report(config, store, trainer.state.timestamp.batch.value)
    except BaseException as error:
        # Composer turns SIGINT and SIGTERM into SystemExit.
        stopped = isinstance(error, KeyboardInterrupt | SystemExit)
        store.end_status = "KILLED" if stopped else "FAILED"
        if stopped:
            newest = next(iter(files.saved(checkpoint_folder(config))), None)
            _say(f"stopped; the same command goes on from {newest or 'the beginning: nothing was saved yet'}")
        raise
    finally:
        trainer.close()


def build_trainer(
    config: RunConfig,
    tokenizer: Tokenizer,
    device: str,
    store: MLflowStore,
    peak_flops: float,
    resume_from: Path | None,
) -> Trainer:
    """The Trainer of a run; ``resume_from`` is loaded into it. ``peak_flops``: of one device, for MFU."""
    on_cpu = device == "cpu"
    model = ComposerDbrx(build_model(config, device), cpu_autocast=on_cpu and config.precision == "amp_bf16")
    clock, optimization = config.clock, config.optimization
    often = clock.interval(config.logging.interval)
    most = max(stage.tokens_per_batch for stage in clock.stages)
    whole = most // config.data.seq_len // dist.get_world_size()
    callbacks = [
        LearningRate(optimization.learning_rate, clock),
        GradientNorm(optimization.clip_grad_norm),
        ExpertLoad(often),
        MixServed(often),
        SpeedMonitor(
            window_size=max(1, clock.first_step(config.logging.interval).batch),
            gpu_flops_available=peak_flops,
        ),
        PeakMemory(often) if on_cpu else MemoryMonitor(),
        Progress(clock, enabled=config.logging.progress),
        Checkpoints(
            checkpoint_folder(config),
            clock.interval(config.checkpoints.interval),
            config.checkpoints.keep,
            to_dict(config),
        ),
    ]
    optimizer = build_optimizer(model.model, optimization.optimizer)
    options = [{k: v for k, v in group.items() if k != "params"} for group in optimizer.param_groups]
    trainer = Trainer(
        model=model,
        train_dataloader=train_data(config, tokenizer),
        eval_dataloader=evaluators(config, tokenizer),
        max_duration=f"{clock.total_tokens}tok",
        optimizers=optimizer,
        callbacks=callbacks,
        loggers=[store],
        run_name=config.run_name,
        progress_bar=False,
        load_path=str(resume_from) if resume_from else None,
        device=device,
        precision="fp32" if on_cpu else config.precision,
        device_train_microbatch_size=optimization.microbatch_size or whole,
        accumulate_train_batch_on_tokens=True,
        seed=config.seed,
    )
    # Loading brought back the old learning rate, decay and betas: the run's configuration decides.
    for group, now in zip(optimizer.param_groups, options, strict=True):
        group.update(now)
    return trainer


def build_model(config: RunConfig, device: str) -> Dbrx:
    """The run's model with weights drawn from its seed; over several ranks, sharded."""
    if dist.get_world_size() == 1:
        return Dbrx(config.model, seed=config.seed)
    with torch.device("meta"):
        model = Dbrx(config.model)
    parallelize(
        model,
        mesh_shape(config, dist.get_world_size()),
        device_type="cpu" if device == "cpu" else "cuda",
        seed=config.seed,
        param_dtype=torch.bfloat16 if config.precision == "amp_bf16" else None,
        reshard_after_forward=config.parallelism.reshard_after_forward,
    )
    return model


def mesh_shape(config: RunConfig, world_size: int) -> MeshShape:
    """The run's mesh on so many ranks.

    Raises:
        ConfigError: there is none.
    """
    parallelism = config.parallelism
    try:
        shape = MeshShape.of(
            world_size,
            replicate=parallelism.replicate,
            shard=None if parallelism.shard == "auto" else int(parallelism.shard),
            expert=parallelism.expert,
        )
        shape.check(config.model)
    except ValueError as error:
        raise ConfigError(f"parallelism.{error}") from None
    return shape


def check_world(config: RunConfig, world_size: int) -> None:
    """The ranks form the mesh; every global batch splits over them, and a rank's share into microbatches.

    Raises:
        ConfigError: it does not.
    """
    mesh_shape(config, world_size)
    base, micro = config.data.seq_len, config.optimization.microbatch_size
    for stage in config.clock.stages:
        if stage.global_batch_size % world_size:
            # In samples of data.seq_len, as the configuration counts them
            unit = max(1, world_size * stage.seq_len // base)
            nearest = max(1, round(stage.tokens_per_batch / base / unit)) * unit
            raise ConfigError(
                f"optimization.global_batch_size: {stage} does not split over {world_size} ranks; the "
                f"nearest size that does, in samples of {base}, is {nearest}"
            )
        mine = stage.global_batch_size // world_size
        part = mine if micro is None else samples_of(micro, base, stage.seq_len)
        if mine % min(mine, part):
            raise ConfigError(
                f"optimization.microbatch_size: {micro} does not divide a rank's "
                f"{mine * stage.seq_len // base} samples of {base} tokens ({stage} over {world_size} ranks)"
            )
        if micro is not None and stage.seq_len > micro * base:
            warnings.warn(
                f"optimization.microbatch_size: a microbatch of {micro} x {base} tokens becomes a sample of "
                f"{stage.seq_len} after {stage.token:,} tokens",
                stacklevel=2,
            )


def checkpoint_folder(config: RunConfig) -> Path:
    return Path(config.folder) / "checkpoints"


def _check_same_model(config: RunConfig, path: Path, content: dict[str, Any]) -> None:
    saved, now = dict(flatten(files.run_config(content))), dict(flatten(to_dict(config)))
    for key in _FIXED:
        if now[key] != saved.get(key):
            raise ConfigError(
                f"{key}: {now[key]} here, but {path} was saved with {saved.get(key)}; "
                f"give the run another run_name= to start afresh"
            )


def _check_mix(config: RunConfig, saved: dict[str, Any] | None) -> None:
    """What only the data and the saved run can tell, before anything is touched.

    Raises:
        ValueError: a source is repeated too often, or the mix's past is not that of the saved run.
    """
    dataset = train_dataset(config)
    if saved:
        dataset.load_state_dict(saved["state"]["dataset_state"]["train"])
    config.check_repetition(dataset.schedule, dataset.sizes)


def _device(config: RunConfig) -> str:
    if config.device == "gpu" and not torch.cuda.is_available():
        raise ConfigError("device: gpu, but torch finds no CUDA GPU on this machine; use cpu or auto")
    return {"auto": "gpu" if torch.cuda.is_available() else "cpu"}.get(config.device, config.device)


def _open_store(config: RunConfig, *, resume: bool) -> MLflowStore:
    """Raises ConfigError if the tracking URI cannot be used."""
    uri = config.logging.mlflow_uri
    try:
        return MLflowStore(
            uri=uri, experiment=config.logging.experiment, run_name=config.run_name, resume=resume
        )
    except STORE_ERRORS as error:
        raise ConfigError(f"logging.mlflow_uri: {uri} cannot be used ({first_line(error)})") from None


def _record(config: RunConfig, store: MLflowStore, peak: str) -> None:
    """Keep the resolved configuration and the environment with the run."""
    if dist.get_global_rank() != 0:
        return
    store.log_hyperparameters(
        {key: str(value) for key, value in flatten(to_dict(config))}
        | environment.describe()
        | {
            "mfu.formula": "(6*active_params_without_embedding + 12*n_layers*d_model*seq_len)*tokens/s/peak",
            "mfu.peak": peak,
            "model.num_params": config.model.num_params,
            "model.num_active_params": config.model.num_active_params,
        }
    )
    path = Path(config.folder) / "config.yaml"
    path.write_text(to_yaml(config), encoding="utf-8")
    store.log_artifact(path)


def _report(config: RunConfig, store: MLflowStore, batch: int) -> None:
    """Draw the run, and say how it went and where it is; it ended, and was saved, at step ``batch``."""
    try:
        picture = Path(config.folder) / "training.png"
        report.draw(store, config.clock, picture)
        store.log_artifact(picture)
        for source, points in report.held_out_losses(store).items():
            (begin, first), (step, last) = points[0], points[-1]
            before = f"{first:.3f} after {_tokens(config, begin)}, " if len(points) > 1 else ""
            _say(f"held-out {source}: loss {before}{last:.3f} after {_tokens(config, step)}")
    except STORE_ERRORS as error:
        _say(f"no picture of the run: MLflow cannot be read ({first_line(error)})")
    _say(f"checkpoint: {checkpoint_folder(config)}/ba{batch}.pt")
    uri = config.logging.mlflow_uri
    page = f"#/experiments/{store.experiment_id}/runs/{store.run_id}"
    if uri.startswith(("http://", "https://")):
        _say(f"run {store.run_id}: {uri.rstrip('/')}/{page}")
    else:
        _say(f"run {store.run_id}: mlflow ui --backend-store-uri {uri}, then http://127.0.0.1:5000/{page}")


def _tokens(config: RunConfig, step: int) -> str:
    return f"{int(config.clock.convert(step, 'ba', 'tok')):,} tokens"


def _say(text: str) -> None:
    if dist.get_global_rank() == 0:
        print(text, flush=True)
