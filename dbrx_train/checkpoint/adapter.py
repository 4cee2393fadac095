"""Adapters out of the checkpoints of a run that trained them: merged into the weights, or alone.

Such a checkpoint holds the factors (and the norms, by which the weights beside them are known again); these
weights lie where the run's ``init_from`` says.
"""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save
from torch import Tensor

from dbrx_train.checkpoint import folder as folders
from dbrx_train.checkpoint.tensors import Reader
from dbrx_train.errors import check_exists
from dbrx_train.files import naming_file
from dbrx_train.lease import new_folder
from dbrx_train.model.init import is_norm
from dbrx_train.model.lora import factor_names, is_factor
from dbrx_train.parallel.fsdp import local_rows

__all__ = ["base_of", "check_base", "is_adapter", "read_merged", "write_adapter"]

PEFT_FILES = "adapter_config.json", "adapter_model.safetensors"
EXPERTS_FILE = "experts.safetensors"


def is_adapter(config: dict[str, Any]) -> bool:
    """Whether the run of this configuration trained adapters."""
    return config.get("lora", {}).get("rank") is not None


def base_of(checkpoint: folders.Checkpoint) -> Path:
    """Where the weights beside a checkpoint's adapters lie.

    Raises:
        ValueError: nothing is there.
    """
    path = Path(checkpoint.config["init_from"]["path"])
    if not path.exists():
        raise ValueError(f"{checkpoint.folder}: holds adapters of the weights in {path}, which is not there")
    return path


def check_base(reader: Reader, model: dict[str, Tensor], base: str) -> None:
    """Make sure that adapters in a checkpoint are of these weights (``model_tensors``), by their norms.

    Raises:
        ValueError: a run that went on, or another, has changed ``base`` since.
    """
    norms = {name: tensor.detach() for name, tensor in model.items() if is_norm(name)}
    saved = {name: torch.empty_like(tensor) for name, tensor in norms.items()}
    reader.read(saved)
    for name, tensor in norms.items():
        if not torch.equal(local_rows(tensor)[0], local_rows(saved[name])[0]):
            raise ValueError(
                f"{base}: its weights are not those that the adapters in {reader.path} were trained beside; "
                f"restore them"
            )


@torch.no_grad()
def read_merged(
    tensors: dict[str, Tensor],
    read_base: Callable[[dict[str, Tensor]], None],
    config: dict[str, Any],
    reader: Reader,
) -> None:
    """Fill tensors (whole, or rows of DTensors) with weights to which adapters were added in float32.

    Buffers that the run trained on beside its adapters (the routers' biases) come from it too.
    """
    own = {name: tensor for name, tensor in tensors.items() if f"model.{name}" in reader.shapes}
    reader.read({f"model.{name}": tensor for name, tensor in own.items()})
    for name, tensor in tensors.items():
        if name in own:
            continue
        a, b = (f"model.{factor}" for factor in factor_names(name))
        if a not in reader.shapes:
            read_base({name: tensor})
            continue
        total = torch.empty_like(tensor, dtype=torch.float32)
        read_base({name: total})
        A, B = (torch.empty(reader.shapes[factor][0]) for factor in (a, b))
        reader.read({a: A, b: B})
        local, first = local_rows(total)
        local += product(A, B, config["lora"], first, first + len(local))
        tensor.copy_(total)


def product(A: Tensor, B: Tensor, lora: dict[str, Any], start: int, stop: int) -> Tensor:
    """Rows [start, stop) of what factors add to a weight: (alpha / rank) B A, expert by expert.

    A [experts * rank, columns], B [experts * rows, rank]; attention's have one expert.
    """
    rank = int(lora["rank"])
    rows = B.shape[0] * rank // A.shape[0]
    parts = [A.new_empty(0, A.shape[1])]
    for expert in range(start // rows, -(-stop // rows)):
        begin, end = max(start, expert * rows), min(stop, (expert + 1) * rows)
        parts.append(B[begin:end] @ A[expert * rank : (expert + 1) * rank])
    scale: float = lora["alpha"] / rank
    return scale * torch.cat(parts)


def write_adapter(path: Path, out: Path, on_skip: Callable[[str], None]) -> list[str]:
    """Write a run's adapters to a folder; returns the names of its files.

    Those of attention are in PEFT's format. It has none for experts of this model: transformers'
    ``DbrxForCausalLM`` reads their weights past the module that PEFT would wrap. They go beside it, into
    ``experts.safetensors``, by our names.

    Raises:
        ValueError: there is no such checkpoint, or ``out`` exists.
    """
    check_exists(path)
    held = folders.hold_newest(path, on_skip)
    if held is None:
        raise ValueError(f"{path}: neither a run with checkpoints nor a checkpoint")
    found, hold = held
    if not is_adapter(found.config):
        raise ValueError(f"{found.folder}: holds no adapters; its run trained the weights themselves")
    reader, lora = Reader(found.folder), found.config["lora"]
    factors = {
        name.removeprefix("model."): torch.empty(shape, dtype=dtype)
        for name, (shape, dtype) in reader.shapes.items()
        if name.startswith("model.") and is_factor(name)
    }
    with hold:
        reader.read({f"model.{name}": tensor for name, tensor in factors.items()})
    experts = {name: tensor for name, tensor in factors.items() if ".experts." in name}
    attention = {f"base_model.model.{name}": factors[name] for name in factors if name not in experts}
    targets = sorted({name.split(".")[-3] for name in attention})
    written = []
    with new_folder(out) as partial, naming_file(out):
        if experts:
            about = {"format": "pt", "rank": str(lora["rank"]), "alpha": str(lora["alpha"])}
            (partial / EXPERTS_FILE).write_bytes(save(experts, about))
            written.append(EXPERTS_FILE)
        if attention:
            (partial / PEFT_FILES[1]).write_bytes(save(attention, {"format": "pt"}))
            base = found.config["init_from"]["path"]
            content = {
                "base_model_name_or_path": base if Path(base, "config.json").is_file() else None,
                "bias": "none",
                "fan_in_fan_out": False,
                "inference_mode": True,
                "lora_alpha": lora["alpha"],
                "lora_dropout": 0.0,
                "peft_type": "LORA",
                "r": lora["rank"],
                "target_modules": targets,
                "task_type": "CAUSAL_LM",
            }
            (partial / PEFT_FILES[0]).write_text(json.dumps(content, indent=2) + "\n", encoding="utf-8")
            written += PEFT_FILES
    return written
