"""Trackers beside MLflow that a run's YAML asks for: TensorBoard and Weights & Biases."""

from __future__ import annotations

import atexit
import hashlib
from pathlib import Path

from composer import Logger, State
from composer.loggers import LoggerDestination, TensorboardLogger, WandBLogger

from dbrx_train.config import RunConfig, for_record

__all__ = ["other_trackers"]

_FLUSH_STEPS = 10


def other_trackers(config: RunConfig) -> list[LoggerDestination]:
    """Composer's loggers of a run but MLflow's; each goes on with what it has of the run."""
    found: list[LoggerDestination] = []
    folder = Path(config.folder)
    if config.logging.tensorboard:
        found.append(TensorboardLogger(log_dir=str(folder / "tensorboard"), flush_interval=_FLUSH_STEPS))
    if config.logging.wandb is not None:
        place = hashlib.sha256(str(folder.absolute()).encode()).hexdigest()[:16]
        found.append(
            WandB(
                project=config.logging.wandb,
                name=config.run_name,
                init_kwargs={
                    "id": place,
                    "resume": "allow",
                    "dir": str(folder),
                    "config": for_record(config),
                },
            )
        )
    return found


class WandB(WandBLogger):  # type: ignore[misc]
    """Composer's logger, begun without ``Run.get_url``, which wandb no longer has."""

    def init(self, state: State, logger: Logger) -> None:
        if not self._enabled:
            return
        import wandb

        begun = wandb.init(**self._init_kwargs)
        self.run_dir, self.run_url = begun.dir, begun.url
        self.entity, self.project = begun.entity, begun.project
        atexit.register(self._set_is_in_atexit)
