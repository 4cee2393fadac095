"""The model of a run that begins with weights: what `init_from.path` says of it."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import yaml

from dbrx_train.config.errors import ConfigError, naming
from dbrx_train.errors import seen_from
from dbrx_train.model.config import DbrxConfig

__all__ = ["CHECKPOINT_MANIFEST", "with_model"]

CHECKPOINT_MANIFEST = "checkpoint.json"
"""Of a checkpoint: written last, it commits it."""


_OF_TRAINING = {
    "router_jitter",
    "balance_loss",
    "balance_loss_weight",
    "router_z_loss_weight",
    "loss_free_bias_rate",
    "output_z_loss_weight",
    "expert_impl",
    "loss_chunk_size",
    "init_method",
    "init_std",
    "init_residual_scaling",
}
"""Options that say how a model is trained, not what its weights compute: each run's own."""


def with_model(given: Mapping[Any, Any]) -> dict[Any, Any]:
    """A run's values with those of `model` that they leave to the weights in `init_from.path`.

    Raises:
        ConfigError: nothing says what the model is.
    """
    path, model = (given.get("init_from") or {}).get("path"), given.get("model") or {}
    if path is None:
        if not model:
            raise ConfigError(
                "model: is missing; give its shape, as the files of configs do, or init_from.path"
            )
        return dict(given)
    known = _options(Path(path))
    if known is None and not model:
        raise ConfigError(
            f"init_from.path: {path} does not say what model it is{seen_from(Path(path))}; correct it, or "
            f"give the shape as model"
        )
    own = {key: value for key, value in (known or {}).items() if key not in _OF_TRAINING}
    return dict(given) | {"model": own | model}


def _options(path: Path) -> dict[str, Any] | None:
    """Of the model in a Hugging Face folder, a run or a checkpoint; None if it is none of these."""
    if (path / "config.json").is_file():
        with naming("init_from.path: "):
            return DbrxConfig.from_hf(path).to_dict()
    for place in (path / CHECKPOINT_MANIFEST, path / "config.yaml"):
        try:
            content = place.read_text(encoding="utf-8")
            said = json.loads(content)["config"] if place.suffix == ".json" else yaml.safe_load(content)
            names = {field.name for field in dataclasses.fields(DbrxConfig)}
            return {key: value for key, value in said["model"].items() if key in names}
        except (OSError, ValueError, TypeError, KeyError, AttributeError, yaml.YAMLError):
            continue  # whoever reads the weights says what is wrong with them
    return None
