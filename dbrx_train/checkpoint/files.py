"""A run's checkpoints as files: which there are, what they hold, the model in them."""

from __future__ import annotations

import datetime
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch

from dbrx_train.config import first_line
from dbrx_train.model.config import DbrxConfig
from dbrx_train.model.decoder import Dbrx

_NAME = re.compile(r"ba(\d+)\.pt")

# What Composer puts beside tensors and plain values: durations, torch's version, NumPy's random state.
_SAFE: list[Any] = [
    datetime.timedelta,
    torch.torch_version.TorchVersion,
    np.ndarray,
    np.dtype,
    np.dtypes.UInt32DType,
    np.empty(0).__reduce__()[0],
]


def saved(folder: Path) -> list[Path]:
    """The whole checkpoints in ``folder``, newest first."""
    found = [(int(m[1]), p) for p in folder.glob("ba*.pt") if (m := _NAME.fullmatch(p.name))]
    return [path for _, path in sorted(found, reverse=True)]


def newest(folder: Path, passed_over: Callable[[str], None]) -> tuple[Path, dict[str, Any]] | None:
    """The newest checkpoint that reads whole, and its content; ``passed_over`` hears of those that do not."""
    for path in saved(folder):
        try:
            return path, read(path)
        except ValueError as error:
            passed_over(f"passed over {error}")
    return None


def read(path: Path) -> dict[str, Any]:
    """A checkpoint's content. Tensors are memory-mapped: only those that are used are read.

    No code in the file is run: what is neither tensor nor plain value nor on ``_SAFE`` is refused.

    Raises:
        ValueError: the file is missing, damaged, or no checkpoint of ours.
    """
    try:
        with torch.serialization.safe_globals(_SAFE):
            content = torch.load(path, map_location="cpu", mmap=True, weights_only=True)
        run_config(content)
    except FileNotFoundError:
        raise ValueError(f"{path}: no such file") from None
    except Exception as error:  # torch raises a different one for each kind of damage
        raise ValueError(f"{path}: not a whole checkpoint ({first_line(error)})") from None
    assert isinstance(content, dict)
    return content


def run_config(content: dict[str, Any]) -> dict[str, Any]:
    """The resolved configuration of the run that saved a checkpoint."""
    config: dict[str, Any] = content["state"]["callbacks"]["Checkpoints"]["config"]
    return config


def tokens_done(content: dict[str, Any]) -> int:
    """Tokens that the run had seen."""
    return int(content["state"]["timestamp"]["Timestamp"]["token"])


def load_model(path: Path, passed_over: Callable[[str], None]) -> tuple[Dbrx, dict[str, Any]]:
    """The float32 model in a checkpoint file, a run's folder, or a folder in Hugging Face format.

    Beside it, the tokenizer that the run was configured with (``load_tokenizer``'s arguments; empty for a
    Hugging Face folder).

    Raises:
        ValueError: there is none.
    """
    if (path / "config.json").exists():
        return Dbrx.from_pretrained(path, dtype=torch.float32), {}
    if path.is_dir():
        found = newest(path, passed_over) or newest(path / "checkpoints", passed_over)
        if found is None:
            raise ValueError(f"{path}: neither a run with checkpoints nor a folder with a config.json")
        content = found[1]
    else:
        content = read(path)
    config = run_config(content)
    with torch.device("meta"):
        model = Dbrx(DbrxConfig.from_dict(config["model"]))
    weights = {k.removeprefix("model."): v.float() for k, v in content["state"]["model"].items()}
    model.load_state_dict(weights, assign=True)
    return model, config["tokenizer"]
