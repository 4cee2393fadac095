"""Hugging Face folders in and out, for models that fit one host."""

from __future__ import annotations

import json
import os
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from dbrx_train.model.config import DbrxConfig

if TYPE_CHECKING:
    from dbrx_train.model.decoder import Dbrx

SINGLE_FILE = "model.safetensors"
INDEX_FILE = "model.safetensors.index.json"
MAX_SHARD_BYTES = 5 * 10**9


def load(model_class: type[Dbrx], folder: str | os.PathLike[str], dtype: torch.dtype | None = None) -> Dbrx:
    """Build the model of a folder's config.json and fill it from model.safetensors or its shards.

    dtype: that of the weights; None keeps the stored one. Peak memory is the model and one tensor.
    Raises ValueError, naming every missing, unexpected or misshapen tensor at once.
    """
    folder = Path(folder)
    config = DbrxConfig.from_hf(folder)
    with torch.device("meta"):
        model = model_class(config)
    files = weight_files(folder)
    stored = _check(folder, files, model.state_dict())
    model = model.to(dtype or stored).to_empty(device="cpu")
    state = model.state_dict()
    for file in files:
        with safe_open(file, framework="pt") as tensors:
            for name in tensors.keys():  # noqa: SIM118 (not a dict)
                state[name].copy_(tensors.get_tensor(name))
    return model


def save(model: Dbrx, folder: str | os.PathLike[str], max_shard_bytes: int = MAX_SHARD_BYTES) -> None:
    """Write config.json and safetensors, in several shards with an index above `max_shard_bytes`.

    Weights that an earlier save left in the folder are replaced. Raises ValueError for a model that the
    Hugging Face class cannot express.
    """
    config = model.config.to_hf()
    state = {name: tensor.detach().contiguous() for name, tensor in model.state_dict().items()}
    config["torch_dtype"] = str(state["lm_head.weight"].dtype).removeprefix("torch.")
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    stale = {*folder.glob("model*.safetensors"), folder / INDEX_FILE}

    shards = _split(state, max_shard_bytes)
    files = [SINGLE_FILE]
    if len(shards) > 1:
        files = [f"model-{i:05d}-of-{len(shards):05d}.safetensors" for i in range(1, len(shards) + 1)]
    for file, shard in zip(files, shards, strict=True):
        partial = folder / f"{file}.partial"  # so that a torn write never looks like weights
        save_file({name: state[name] for name in shard}, partial, metadata={"format": "pt"})
        partial.replace(folder / file)
    if len(shards) > 1:
        index = {
            "metadata": {"total_size": sum(t.nbytes for t in state.values())},
            "weight_map": {name: file for file, shard in zip(files, shards, strict=True) for name in shard},
        }
        _write_json(folder / INDEX_FILE, index)
        stale.discard(folder / INDEX_FILE)
    _write_json(folder / "config.json", config)
    for path in stale - {folder / file for file in files}:
        path.unlink(missing_ok=True)


def weight_files(folder: Path) -> list[Path]:
    """The safetensors files of a Hugging Face folder; ValueError where one is missing."""
    index = folder / INDEX_FILE
    if (folder / SINGLE_FILE).is_file():
        files = [folder / SINGLE_FILE]
    elif index.is_file():
        try:
            names = set(json.loads(index.read_text(encoding="utf-8"))["weight_map"].values())
        except (ValueError, KeyError, AttributeError) as error:
            raise ValueError(f"{index}: is damaged; must hold a JSON object with a weight_map") from error
        files = [folder / name for name in sorted(names)]
    else:
        raise ValueError(f"{folder}: holds no weights; must have {SINGLE_FILE} or {INDEX_FILE}")
    for file in files:
        if not file.is_file():
            raise ValueError(f"{file}: is missing, though {INDEX_FILE} names it")
    return files


def _check(folder: Path, files: list[Path], expected: Mapping[str, Tensor]) -> torch.dtype:
    """Compare names and shapes with the files' headers; returns the stored dtype of the head."""
    shapes: dict[str, tuple[int, ...]] = {}
    dtype = torch.get_default_dtype()
    for file in files:
        try:
            with safe_open(file, framework="pt") as tensors:
                shapes |= {name: tuple(tensors.get_slice(name).get_shape()) for name in tensors.keys()}  # noqa: SIM118
                if "lm_head.weight" in tensors.keys():  # noqa: SIM118
                    dtype = tensors.get_slice("lm_head.weight")[:1].dtype
        except SafetensorError as error:
            raise ValueError(f"{file}: is not a whole safetensors file ({error})") from error
    problems = [f"missing {name}" for name in expected if name not in shapes]
    problems += [f"unexpected {name}" for name in shapes if name not in expected]
    problems += [
        f"{name} is {list(shapes[name])}, must be {list(tensor.shape)}"
        for name, tensor in expected.items()
        if name in shapes and shapes[name] != tuple(tensor.shape)
    ]
    if problems:
        raise ValueError(f"{folder}: does not fit its config.json: {'; '.join(problems)}")
    return dtype


def _split(state: Mapping[str, Tensor], max_bytes: int) -> list[list[str]]:
    """Names in order, a new shard whenever the next tensor would overfill the last."""
    shards: list[list[str]] = [[]]
    size = 0
    for name, tensor in state.items():
        if shards[-1] and size + tensor.nbytes > max_bytes:
            shards.append([])
            size = 0
        shards[-1].append(name)
        size += tensor.nbytes
    return shards


def _write_json(path: Path, content: object) -> None:
    path.write_text(json.dumps(content, indent=2) + "\n", encoding="utf-8")
