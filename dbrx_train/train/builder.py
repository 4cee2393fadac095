"""From a RunConfig to a trained model: builds composer.Trainer, runs it, says where the results are."""

from __future__ import annotations

from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
from composer import Trainer
from composer.callbacks import MemoryMonitor, SpeedMonitor
from composer.utils import dist, get_device

from dbrx_train.checkpoint import files
from dbrx_train.config import ConfigError, RunConfig, flatten, to_dict, to_yaml
from dbrx_train.data.tokenizer import load_tokenizer
from dbrx_train.train import environment, report
from dbrx_train.train.callbacks.checkpoints import Checkpoints
from dbrx_train.train.callbacks.expert_load import ExpertLoad
from dbrx_train.train.callbacks.gradients import GradientNorm
from dbrx_train.train.callbacks.learning_rate import LearningRate
from dbrx_train.train.callbacks.progress import Progress
from dbrx_train.train.composer_model import ComposerDbrx
from dbrx_train.train.loaders import check_sources, evaluators, train_data, train_dataset
from dbrx_train.train.mlflow_store import MLflowStore
from dbrx_train.train.optimizers import build_optimizer
from dbrx_train.train.throughput import peak_flops

# What a checkpoint's tensors depend on; other model keys may change when a run goes on.
_SHAPE_KEYS = (
    "d_model",
    "n_layers",
    "n_heads",
    "n_kv_heads",
    "vocab_size",
    "ffn_hidden_size",
    "num_experts",
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
    resume_from = find_checkpoint(config)
    if resume_from and files.batches_done(resume_from) >= config.clock.total_batches:
        _say(f"{config.run_name} is done: {resume_from} holds its end. A larger max_duration= continues it.")
        return
    _check_mix(config, resume_from)
    dist.initialize_dist(get_device(device))
    store = MLflowStore(
        uri=config.logging.mlflow_uri,
        experiment=config.logging.experiment,
        run_name=config.run_name,
        resume=resume_from is not None,
    )
    trainer = build_trainer(config, device, store, resume_from)
    try:
        _record(config, store, device)
        if config.evaluation.at_start and resume_from is None and trainer.state.evaluators:
            trainer.eval()
        trainer.fit()
        if dist.get_global_rank() == 0:
            picture = Path(config.folder) / "training.png"
            report.draw(store, config.clock.tokens_per_batch, picture)
            store.log_artifact(picture)
            _say(_summary(config, store))
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


def build_trainer(config: RunConfig, device: str, store: MLflowStore, resume_from: Path | None) -> Trainer:
    """The Trainer of a run; ``resume_from`` is loaded into it."""
    tokenizer = load_tokenizer(config.tokenizer.name, config.tokenizer.vocab_file)
    on_cpu = device == "cpu"
    model = ComposerDbrx(config.model, config.seed, cpu_autocast=on_cpu and config.precision == "amp_bf16")
    clock, optimization = config.clock, config.optimization
    peak = config.logging.peak_flops or peak_flops(device, config.precision)[0]
    per_rank = optimization.global_batch_size // dist.get_world_size()
    callbacks = [
        LearningRate(optimization.learning_rate, clock),
        GradientNorm(optimization.clip_grad_norm),
        ExpertLoad(clock.batches(config.logging.interval)),
        SpeedMonitor(window_size=clock.batches(config.logging.interval), gpu_flops_available=peak),
        Progress(clock, enabled=config.logging.progress),
        Checkpoints(
            checkpoint_folder(config),
            clock.batches(config.checkpoints.interval),
            config.checkpoints.keep,
            to_dict(config),
        ),
    ]
    if not on_cpu:
        callbacks.append(MemoryMonitor())
    return Trainer(
        model=model,
        train_dataloader=train_data(config, tokenizer),
        eval_dataloader=evaluators(config, tokenizer),
        max_duration=f"{clock.total_batches}ba",
        optimizers=build_optimizer(model.model, optimization.optimizer),
        callbacks=callbacks,
        loggers=[store],
        run_name=config.run_name,
        progress_bar=False,
        load_path=str(resume_from) if resume_from else None,
        device=device,
        precision="fp32" if on_cpu else config.precision,
        device_train_microbatch_size=min(optimization.microbatch_size or per_rank, per_rank),
        accumulate_train_batch_on_tokens=True,
        seed=config.seed,
    )


def check_world(config: RunConfig, world_size: int) -> None:
    """The global batch splits evenly over the ranks.

    Raises:
        ConfigError: it does not.
    """
    batch = config.optimization.global_batch_size
    if batch % world_size:
        raise ConfigError(
            f"optimization.global_batch_size: {batch} does not split over {world_size} ranks; "
            f"the nearest that does is {max(1, round(batch / world_size)) * world_size}"
        )


def checkpoint_folder(config: RunConfig) -> Path:
    return Path(config.folder) / "checkpoints"


def find_checkpoint(config: RunConfig) -> Path | None:
    """The run's newest whole checkpoint; damaged ones are named and passed over.

    Raises:
        ConfigError: it is of another model.
    """
    for path in files.saved(checkpoint_folder(config)):
        try:
            content = files.read(path)
        except ValueError as error:
            _say(f"passed over {error}")
            continue
        _check_same_model(config, files.run_config(content), path)
        return path
    return None


def _check_same_model(config: RunConfig, saved: dict[str, Any], path: Path) -> None:
    now, then = asdict(config.model), saved["model"]
    for key in _SHAPE_KEYS:
        if now[key] != then.get(key):
            raise ConfigError(
                f"model.{key}: {now[key]} here, but {path} was saved with {then.get(key)}; "
                f"give the run another run_name= to start afresh"
            )


def _check_mix(config: RunConfig, resume_from: Path | None) -> None:
    """What only the data and the saved run can tell, before anything is touched.

    Raises:
        ValueError: a source is repeated too often, or the mix's past is not that of the saved run.
    """
    dataset = train_dataset(config)
    if resume_from:
        dataset.load_state_dict(files.read(resume_from)["state"]["dataset_state"]["train"])
    limits = {n: s.max_epochs for n, s in config.data.sources.items() if s.max_epochs is not None}
    samples = config.clock.total_batches * config.optimization.global_batch_size
    dataset.schedule.repetition(dataset.sizes, samples // config.data.canonical_nodes, limits)


def _device(config: RunConfig) -> str:
    if config.device == "gpu" and not torch.cuda.is_available():
        raise ConfigError("device: gpu, but torch finds no CUDA GPU on this machine; use cpu or auto")
    return {"auto": "gpu" if torch.cuda.is_available() else "cpu"}.get(config.device, config.device)


def _record(config: RunConfig, store: MLflowStore, device: str) -> None:
    """Keep the resolved configuration and the environment with the run."""
    if dist.get_global_rank() != 0:
        return
    peak, source = peak_flops(device, config.precision)
    store.log_hyperparameters(
        {key: str(value) for key, value in flatten(to_dict(config))}
        | environment.describe()
        | {
            "mfu.formula": "(6*active_params_without_embedding + 12*n_layers*d_model*seq_len)*tokens/s/peak",
            "mfu.peak_flops": f"{config.logging.peak_flops or peak:.4g}",
            "mfu.peak_source": "logging.peak_flops" if config.logging.peak_flops else source,
            "model.num_params": config.model.num_params,
            "model.num_active_params": config.model.num_active_params,
        }
    )
    path = Path(config.folder) / "config.yaml"
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(to_yaml(config), encoding="utf-8")
    store.log_artifact(path)


def _summary(config: RunConfig, store: MLflowStore) -> str:
    lines = []
    for source, points in report.held_out_losses(store).items():
        lines.append(f"held-out {source}: loss {points[0][1]:.3f} at the start, {points[-1][1]:.3f} now")
    lines.append(f"checkpoint: {files.saved(checkpoint_folder(config))[0]}")
    uri = config.logging.mlflow_uri
    lines.append(
        f"run {store.run_id}: mlflow ui --backend-store-uri {uri}, "
        f"then http://127.0.0.1:5000/#/experiments/{store.experiment_id}/runs/{store.run_id}"
    )
    return "\n".join(lines)


def _say(text: str) -> None:
    if dist.get_global_rank() == 0:
        print(text, flush=True)
