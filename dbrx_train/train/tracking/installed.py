"""Whether the trackers that a run asks for are there; told without importing them."""

from __future__ import annotations

import importlib.util

from dbrx_train.config import ConfigError, RunConfig

__all__ = ["check_trackers"]


def check_trackers(config: RunConfig) -> None:
    """Raise ConfigError if a tracker is asked for that is not installed."""
    asked = {"tensorboard": config.logging.tensorboard, "wandb": config.logging.wandb is not None}
    for name, wanted in asked.items():
        if wanted and importlib.util.find_spec(name) is None:
            raise ConfigError(f"logging.{name}: is not installed; pip install 'dbrx-train[{name}]'")
