"""From a RunConfig to composer.Trainer."""

from __future__ import annotations

import warnings

from composer import Trainer
from composer.utils import dist

from dbrx_train.checkpoint.remote import Remote
from dbrx_train.config import ConfigError, RunConfig
from dbrx_train.data.tokenizer import Tokenizer
from dbrx_train.plan.rank import build_model, mesh_shape
from dbrx_train.schedule import samples_of
from dbrx_train.train.callbacks.order import Supervision, callbacks
from dbrx_train.train.composer_model import ComposerDbrx
from dbrx_train.train.data import train_data
from dbrx_train.train.evaluators import evaluators
from dbrx_train.train.optim import build_optimizer
from dbrx_train.train.sharded import check_left_alone
from dbrx_train.train.tracking.mlflow import MLflowStore

__all__ = ["build_trainer", "check_world"]


def build_trainer(
    config: RunConfig,
    tokenizer: Tokenizer,
    device: str,
    store: MLflowStore,
    peak_flops: float,
    remote: Remote | None = None,
    supervision: Supervision | None = None,
) -> Trainer:
    """The Trainer of a run at its beginning.

    ``peak_flops``: of one device, for MFU. ``supervision``: None for a Trainer that nobody watches over.
    """
    on_cpu = device == "cpu"
    model = ComposerDbrx(
        build_model(config, device, mesh_shape(config, dist.get_world_size())),
        cpu_autocast=on_cpu and config.precision == "amp_bf16",
        beta=config.preferences.beta,
    )
    arrived = supervision.heartbeat.batch_arrived if supervision else lambda: None
    data = train_data(config, tokenizer, arrived)
    clock, optimization = config.clock, config.optimization
    most = max(stage.tokens_per_batch for stage in clock.stages)
    whole = most // config.data.seq_len // dist.get_world_size()
    trainer = Trainer(
        model=model,
        train_dataloader=data,
        eval_dataloader=evaluators(config, tokenizer),
        max_duration=f"{clock.total_tokens}tok",
        optimizers=build_optimizer(model.model, optimization.optimizer),
        callbacks=callbacks(config, tokenizer, data, device, peak_flops, remote, supervision),
        loggers=[store],
        run_name=config.run_name,
        progress_bar=False,
        device=device,
        precision="fp32" if on_cpu else config.precision,
        device_train_microbatch_size=optimization.microbatch_size or whole,
        accumulate_train_batch_on_tokens=True,
        seed=config.seed,
    )
    check_left_alone(trainer, model)
    return trainer


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
