"""From a RunConfig to composer.Trainer."""

from __future__ import annotations

from collections.abc import Sequence

from composer import Callback, Trainer
from composer.loggers import LoggerDestination
from composer.utils import dist

from dbrx_train.checkpoint.remote import Remote
from dbrx_train.config import RunConfig
from dbrx_train.data.tokenizer import Tokenizer
from dbrx_train.plan.rank import build_model
from dbrx_train.plan.world import mesh_shape
from dbrx_train.train.callbacks.order import Supervision, callbacks
from dbrx_train.train.composer_model import ComposerDbrx
from dbrx_train.train.data import train_data
from dbrx_train.train.devices import composer_device
from dbrx_train.train.evaluators import evaluators
from dbrx_train.train.optim import build_optimizer
from dbrx_train.train.sharded import check_left_alone
from dbrx_train.train.tracking.mlflow import MLflowStore
from dbrx_train.train.tracking.other_trackers import other_trackers

__all__ = ["build_trainer"]


def build_trainer(
    config: RunConfig,
    tokenizer: Tokenizer,
    device: str,
    store: MLflowStore,
    peak_flops: float,
    remote: Remote | None = None,
    supervision: Supervision | None = None,
    own: Sequence[Callback] = (),
) -> Trainer:
    """The Trainer of a run at its beginning.

    ``peak_flops``: of one device, for MFU. ``supervision``: None for a Trainer that nobody watches over.
    ``own``: callbacks and loggers beside the run's, called after these.
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
        callbacks=[
            *callbacks(config, tokenizer, data, device, peak_flops, remote, supervision),
            *(each for each in own if not isinstance(each, LoggerDestination)),
        ],
        loggers=[
            store,
            *other_trackers(config),
            *(each for each in own if isinstance(each, LoggerDestination)),
        ],
        run_name=config.run_name,
        progress_bar=False,
        device=composer_device(device),
        precision="fp32" if on_cpu else config.precision,
        device_train_microbatch_size=optimization.microbatch_size or whole,
        accumulate_train_batch_on_tokens=True,
        seed=config.seed,
    )
    check_left_alone(trainer, model)
    return trainer
