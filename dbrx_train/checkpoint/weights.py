"""The weights alone: out of a checkpoint into any model, or into one file."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import safetensors
import torch
from safetensors import SafetensorError
from torch import Tensor

from dbrx_train.checkpoint import folder as folders
from dbrx_train.checkpoint.adapter import base_of, check_base, is_adapter, read_merged
from dbrx_train.checkpoint.tensors import Reader
from dbrx_train.config import first_line
from dbrx_train.model.config import DbrxConfig
from dbrx_train.model.decoder import Dbrx
from dbrx_train.model.init import is_norm
from dbrx_train.parallel.sharding import local_rows

__all__ = ["Weights", "consolidate", "load_model", "open_weights"]


@dataclass(frozen=True)
class Weights:
    """Weights at rest, with what is known of the run that made them."""

    config: dict[str, Any]
    """The run's resolved configuration."""
    read: Callable[[dict[str, Tensor]], None]
    """Fills tensors by parameter name: whole ones, or this rank's parts of DTensors. They keep their dtype.
    Raises ValueError if one is missing or has another shape."""


def open_weights(path: Path, passed_over: Callable[[str], None]) -> Weights:
    """The weights in a run's folder, a checkpoint's, or a file that ``consolidate`` wrote.

    Of a run that trained adapters they are the merged ones.

    Raises:
        ValueError: there are none.
    """
    if path.is_file():
        return _open_file(path)
    found = folders.open_newest(path, passed_over)
    reader = Reader(found.folder)
    if is_adapter(found.config):
        base = open_weights(base_of(found), passed_over)
        norms = {name: torch.empty(shape) for name, (shape, _) in reader.shapes.items() if is_norm(name)}
        base.read({name.removeprefix("model."): tensor for name, tensor in norms.items()})
        check_base(reader, norms, str(base_of(found)))
        return Weights(found.config, lambda tensors: read_merged(tensors, base.read, found.config, reader))
    return Weights(found.config, lambda tensors: reader.read({f"model.{k}": v for k, v in tensors.items()}))


def _open_file(path: Path) -> Weights:
    try:
        file: Any = safetensors.safe_open(path, "pt")
        names, config = set(file.keys()), json.loads((file.metadata() or {})["config"])
    except (OSError, SafetensorError, KeyError, ValueError) as error:
        raise ValueError(
            f"{path}: not weights that `checkpoint consolidate` wrote ({first_line(error)})"
        ) from None

    def read(tensors: dict[str, Tensor]) -> None:
        for name, tensor in tensors.items():
            if name not in names:
                raise ValueError(f"{path}: has no tensor {name}")
            rows = file.get_slice(name)
            if tuple(rows.get_shape()) != tuple(tensor.shape):
                raise ValueError(
                    f"{path}: {name} has shape {tuple(rows.get_shape())}, not {tuple(tensor.shape)}"
                )
            local, first = local_rows(tensor)
            local.copy_(rows[first : first + len(local)])

    return Weights(config, read)


def load_model(path: Path, passed_over: Callable[[str], None]) -> tuple[Dbrx, dict[str, Any]]:
    """The float32 model in what ``open_weights`` opens, or in a folder in Hugging Face format.

    Beside it, the tokenizer that the run was configured with (``load_tokenizer``'s arguments; empty for a
    Hugging Face folder).

    Raises:
        ValueError: there is none.
    """
    if (path / "config.json").exists():
        return Dbrx.from_pretrained(path, dtype=torch.float32), {}
    weights = open_weights(path, passed_over)
    with torch.device("meta"):
        model = Dbrx(DbrxConfig.from_dict(weights.config["model"]))
    model.to_empty(device="cpu")
    weights.read(model.state_dict())
    return model, weights.config["tokenizer"]


def consolidate(path: Path, out: Path, dtype: torch.dtype, passed_over: Callable[[str], None]) -> int:
    """Write the weights of a run or checkpoint to one safetensors file; returns its size in bytes.

    The file is mapped, not built in memory, so the model may be larger than the host's. ``dtype`` is that of
    parameters, float32 or bfloat16; buffers stay float32.

    Raises:
        ValueError: there is no checkpoint, or ``out`` exists.
    """
    if out.exists():
        raise ValueError(f"{out}: exists already")
    weights = open_weights(path, passed_over)
    with torch.device("meta"):
        model = Dbrx(DbrxConfig.from_dict(weights.config["model"]))
    parameters = {name for name, _ in model.named_parameters()}
    kinds = {name: dtype if name in parameters else torch.float32 for name in model.state_dict()}
    partial = out.with_name(f"{out.name}.partial")
    shapes = {name: tensor.shape for name, tensor in model.state_dict().items()}
    weights.read(_map_file(partial, shapes, kinds, {"config": json.dumps(weights.config)}))
    partial.rename(out)
    return out.stat().st_size


def _map_file(
    path: Path, shapes: dict[str, torch.Size], kinds: dict[str, torch.dtype], metadata: dict[str, str]
) -> dict[str, Tensor]:
    """Tensors that lie in a new safetensors file: what is written to them is written to it."""
    header: dict[str, Any] = {"__metadata__": {"format": "pt", **metadata}}
    places, end = {}, 0
    for name in sorted(shapes, key=lambda name: -kinds[name].itemsize):  # wide ones first, so all are aligned
        begin, end = end, end + shapes[name].numel() * kinds[name].itemsize
        places[name] = begin, end
        dtype = {torch.float32: "F32", torch.bfloat16: "BF16"}[kinds[name]]
        header[name] = {"dtype": dtype, "shape": list(shapes[name]), "data_offsets": [begin, end]}
    text = json.dumps(header).encode()
    text += b" " * (-len(text) % 8)  # as the format advises
    with path.open("wb") as file:
        file.write(len(text).to_bytes(8, "little") + text)
        file.truncate(file.tell() + end)
    data = torch.from_file(str(path), shared=True, size=8 + len(text) + end, dtype=torch.uint8)[
        8 + len(text) :
    ]
    return {name: data[slice(*places[name])].view(kinds[name]).view(shapes[name]) for name in shapes}
