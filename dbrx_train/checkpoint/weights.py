"""The weights alone: out of whatever holds some into any model, or into one file."""

from __future__ import annotations

import functools
import json
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, BinaryIO

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor, nn

from dbrx_train.checkpoint import folder as folders
from dbrx_train.checkpoint.adapter import base_of, check_base, is_adapter, read_merged
from dbrx_train.checkpoint.lineage import Lineage, of_checkpoint
from dbrx_train.checkpoint.registry import resolve
from dbrx_train.checkpoint.tensors import Reader
from dbrx_train.errors import check_exists, first_line
from dbrx_train.files import atomic_write
from dbrx_train.model.config import DbrxConfig
from dbrx_train.model.decoder import Dbrx
from dbrx_train.model.hf.files import (
    Stored,
    check_finite,
    map_file,
    open_files,
    open_folder,
    open_model,
    sync,
)
from dbrx_train.model.hf.names import Table, identity
from dbrx_train.model.init import is_norm
from dbrx_train.model.lora import is_factor
from dbrx_train.parallel.fsdp import local_rows
from dbrx_train.parallel.gather import gather_objects

if TYPE_CHECKING:
    from dbrx_train.data.tokenizer import Tokenizer

__all__ = [
    "MANIFEST",
    "Weights",
    "consolidate",
    "load_model",
    "meta_model",
    "open_weights",
    "read_together",
    "tokenizer_of",
    "upcycled",
]

MANIFEST = "manifest.json"
"""Written last into an export: every other file with its size and hash, and which tokenizer it is for."""
DBRX_TOKENIZER = {"name": "cl100k_base", "vocab_file": None}


@dataclass(frozen=True)
class Weights:
    """Weights at rest, with what is known of the run that made them."""

    path: Path
    config: dict[str, Any]
    """The run's resolved configuration; of weights from elsewhere, ``model`` and ``tokenizer`` alone, the
    latter None if it is not DBRX's."""
    dtypes: Mapping[str, torch.dtype]
    """What each tensor is stored in."""
    read: Callable[[dict[str, Tensor]], None]
    """Fills tensors by parameter name: whole ones, or this rank's parts of DTensors. They keep their dtype.
    Selection biases that are not there are left as they are.
    Raises ValueError if another tensor is missing or has another shape, or a value in safetensors is not
    finite."""
    tokenizer_fingerprint: str | None = None
    """Of the tokenizer that they were trained with, where that is known."""
    lineage: Lineage | None = None
    """What they were trained on, where that is known."""
    holds: tuple[BinaryIO, ...] = ()
    """Keep runs from pruning what is being read, until ``close``."""

    @property
    def model(self) -> DbrxConfig:
        """The model that they are of."""
        return DbrxConfig.from_dict(self.config["model"])

    def __enter__(self) -> Weights:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def close(self) -> None:
        """They have been read: a run may prune them."""
        for hold in self.holds:
            hold.close()

    def whole(self, name: str, like: Tensor, dtype: torch.dtype) -> Tensor:
        """One tensor, of the shape of ``like``; raises as ``read``, and if a value is not finite."""
        tensor = torch.empty(like.shape, dtype=dtype)
        self.read({name: tensor})
        check_finite(self.path, name, tensor)
        return tensor


def open_weights(path: Path, on_skip: Callable[[str], None]) -> Weights:
    """The weights in a run's folder, a checkpoint's, a Hugging Face folder, or a file of ``consolidate``.

    Of a run that trained adapters they are the merged ones. ``path`` may also name a registered model
    (``registry.resolve``).

    Raises:
        ValueError: there are none, or they are not what their configuration says.
    """
    path = resolve(path)
    check_exists(path)
    if path.is_file():
        return _open_file(path)
    if (path / "config.json").is_file():
        return _open_hugging_face(path)
    held = folders.hold_newest(path, on_skip)
    if held is None:
        raise ValueError(f"{path}: neither a run with checkpoints nor a checkpoint nor a Hugging Face folder")
    found, hold = held
    known: dict[str, Any] = {
        "tokenizer_fingerprint": found.metadata.get("tokenizer"),
        "lineage": of_checkpoint(found),
        "holds": (hold,),
    }
    if ".metadata" not in found.metadata["files"]:  # imported
        folder = found.folder
        imported = _stored(lambda _, shapes: (open_folder(folder), identity(shapes)), found.config)
        return replace(imported, **known)
    reader = Reader(found.folder)
    if is_adapter(found.config):
        merged = _merged(found, reader, on_skip)
        return replace(merged, **known | {"holds": (hold, *merged.holds)})
    stored = {name.removeprefix("model."): dtype for name, (_, dtype) in reader.shapes.items()}

    def read(tensors: dict[str, Tensor]) -> None:
        reader.read({f"model.{name}": t for name, t in tensors.items() if not _starts_anew(name, stored)})

    return Weights(path, found.config, stored, read, **known)


def _merged(found: folders.Checkpoint, reader: Reader, on_skip: Callable[[str], None]) -> Weights:
    """The weights that a run trained adapters beside, with these added."""
    base = open_weights(base_of(found), on_skip)
    norms = {name: torch.empty(shape) for name, (shape, _) in reader.shapes.items() if is_norm(name)}
    base.read({name.removeprefix("model."): tensor for name, tensor in norms.items()})
    check_base(reader, norms, str(base.path))

    def read(tensors: dict[str, Tensor]) -> None:
        read_merged(tensors, base.read, found.config, reader)

    return Weights(found.folder, found.config, base.dtypes, read, holds=base.holds)


def _open_file(path: Path) -> Weights:
    try:
        with safe_open(path, "pt") as file:
            metadata = file.metadata() or {}
        config = json.loads(metadata["config"])
    except (OSError, SafetensorError, KeyError, ValueError) as error:
        raise ValueError(
            f"{path}: not weights that `checkpoint consolidate` wrote ({first_line(error)})"
        ) from None
    stored = _stored(lambda _, shapes: (open_files(path, [path]), identity(shapes)), config)
    lineage = Lineage.from_dict(json.loads(metadata["lineage"])) if "lineage" in metadata else None
    return replace(stored, tokenizer_fingerprint=metadata.get("tokenizer"), lineage=lineage)


def _open_hugging_face(path: Path) -> Weights:
    model = DbrxConfig.from_hf(path)
    written = _export_manifest(path)
    tokenizer, fingerprint = _tokenizer(written, model)
    lineage = written.get("lineage")
    config = {"model": model.to_dict(), "tokenizer": tokenizer}
    stored = _stored(functools.partial(open_model, path), config)
    known = Lineage.from_dict(lineage) if lineage else None
    return replace(stored, tokenizer_fingerprint=fingerprint, lineage=known)


def _export_manifest(path: Path) -> dict[str, Any]:
    """What an export of ours says of itself; nothing of folders from elsewhere."""
    try:
        written = json.loads((path / MANIFEST).read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return {}
    return written if isinstance(written, dict) else {}


def _tokenizer(manifest: dict[str, Any], model: DbrxConfig) -> tuple[dict[str, Any] | None, str | None]:
    """A folder's tokenizer, if it is DBRX's, and the fingerprint of whichever it is, where that is known.

    Of an export of ours the ``manifest`` tells, of folders from elsewhere the model's class.
    """
    from dbrx_train.data.tokenizer import CL100K_FINGERPRINT

    usual = DBRX_TOKENIZER if model.norm == "layernorm" else None
    if "tokenizer" not in manifest:  # from elsewhere, or older
        return usual, None if usual is None else CL100K_FINGERPRINT
    written = manifest["tokenizer"]
    if not isinstance(written, dict):  # the model has no row for each of the ids of any that is known
        return usual, None
    known = written.get("fingerprint")
    return DBRX_TOKENIZER if known == CL100K_FINGERPRINT else None, known


def _stored(
    opened: Callable[[DbrxConfig, dict[str, tuple[int, ...]]], tuple[Stored, Table]], config: dict[str, Any]
) -> Weights:
    """The weights in safetensors files, whose names and shapes must be those of the configuration."""
    model = DbrxConfig.from_dict(config["model"])
    shapes = {name: tuple(tensor.shape) for name, tensor in meta_model(model).state_dict().items()}
    stored, parts = opened(model, shapes)
    stored.check(parts, shapes)

    def read(tensors: dict[str, Tensor]) -> None:
        wanted = {name: tensor for name, tensor in tensors.items() if not _starts_anew(name, shapes)}
        for name, tensor in wanted.items():
            if name not in shapes:
                raise ValueError(f"{stored.path}: has no tensor {name}")
            if shapes[name] != tuple(tensor.shape):
                raise ValueError(f"{stored.path}: {name} has shape {shapes[name]}, not {tuple(tensor.shape)}")
        stored.fill(parts, {name: local_rows(tensor) for name, tensor in wanted.items()})

    dtypes = {
        ours: functools.reduce(torch.promote_types, (stored.dtypes[part.name] for part in all_of))
        for ours, all_of in parts.items()
    }
    return Weights(stored.path, config, dtypes, read)


def _starts_anew(name: str, stored: Mapping[str, Any]) -> bool:
    """Selection biases are no weights: a run that wants them may begin from weights without."""
    return name.endswith("router.expert_bias") and name not in stored


def upcycled(weights: Weights, config: DbrxConfig) -> Weights:
    """Dense weights for a model of several experts: each is a copy of the dense layer (arXiv 2212.05055).

    Routers are left as they are. A token's weights must sum to one, and then the model computes what the
    dense one does.

    Raises:
        ValueError: ``weights`` are not dense, or the model is, or does not make weights sum to one.
    """
    if not weights.model.is_dense:
        count = weights.model.num_experts
        raise ValueError(f"{weights.path}: has {count} experts a layer already; must be dense to upcycle")
    if config.is_dense:
        raise ValueError("model.num_experts: is 1; upcycling makes experts, so must be above 1")
    if config.normalize_expert_weights != 1.0:
        raise ValueError(
            f"model.normalize_expert_weights: is {config.normalize_expert_weights}; must be 1.0 to upcycle, "
            f"so that a token's weights sum to one"
        )

    shapes = meta_model(weights.model).state_dict()

    def read(tensors: dict[str, Tensor]) -> None:
        experts = {name for name in tensors if ".ffn.experts." in name}
        others = tensors.keys() - experts
        weights.read({name: tensors[name] for name in others if ".ffn.router." not in name})
        for name in experts:
            dense = weights.whole(name, shapes[name], weights.dtypes[name])
            local, first = local_rows(tensors[name])
            for begin in range(0, len(local), len(dense)):
                rows = torch.arange(first + begin, first + min(begin + len(dense), len(local))) % len(dense)
                local[begin : begin + len(dense)].copy_(dense[rows])

    return replace(weights, read=read)


def read_together(weights: Weights, model: nn.Module) -> None:
    """Fill a model, but not its adapters, each rank its own rows, and close the weights; what is wrong with
    one's is raised on all.

    Raises:
        ValueError: as ``Weights.read``, and what else went wrong on another rank.
    """
    trouble, cause = None, None
    try:
        weights.read({name: t for name, t in model.state_dict().items() if not is_factor(name)})
    except Exception as error:  # of any kind: the others wait to hear of it
        trouble, cause = str(error) or type(error).__name__, error
    finally:
        weights.close()
    troubles = gather_objects(trouble)
    if cause is not None and not isinstance(cause, ValueError):
        raise cause
    for found in troubles:
        if found is not None:
            raise ValueError(found)


def meta_model(config: DbrxConfig) -> Dbrx:
    """A model without memory, for its tensors' names and shapes."""
    with torch.device("meta"):
        return Dbrx(config)


def load_model(weights: Weights) -> Dbrx:
    """The float32 model that has them, which are closed then; raises as ``Weights.read``."""
    with weights:
        model: Dbrx = meta_model(weights.model).to_empty(device="cpu")
        weights.read(model.state_dict())
    return model


def tokenizer_of(weights: Weights) -> Tokenizer | None:
    """The tokenizer that they were trained with, None if it is not known.

    Raises:
        ValueError: its vocabulary cannot be had, or its file holds another one by now.
    """
    from dbrx_train.data.tokenizer import load_tokenizer

    options, known = weights.config["tokenizer"], weights.tokenizer_fingerprint
    if options is None:
        return None
    tokenizer = load_tokenizer(**options)
    if known not in (None, tokenizer.fingerprint):
        raise ValueError(
            f"{options['vocab_file'] or options['name']}: is another vocabulary than the one that "
            f"{weights.path} was trained with ({tokenizer.fingerprint[:12]}…, not {known[:12]}…); restore it"
        )
    return tokenizer


def consolidate(path: Path, out: Path, dtype: torch.dtype, on_skip: Callable[[str], None]) -> int:
    """Write the weights of a run or checkpoint to one safetensors file; returns its size in bytes.

    The file is mapped, not built in memory, so the model may be larger than the host's. ``dtype`` is that of
    parameters, float32 or bfloat16; buffers stay float32.

    Raises:
        ValueError: there is no checkpoint, a value is not finite, or ``out`` exists.
    """
    if out.exists():
        raise ValueError(f"{out}: exists already; choose another, or delete it")
    with open_weights(path, on_skip) as weights:
        model = meta_model(weights.model)
        state = model.state_dict() | {name: tensor.to(dtype) for name, tensor in model.named_parameters()}
        about = {"config": json.dumps(weights.config)}
        if weights.tokenizer_fingerprint is not None:
            about["tokenizer"] = weights.tokenizer_fingerprint
        if weights.lineage is not None:
            about["lineage"] = json.dumps(weights.lineage.to_dict())
        with atomic_write(out) as partial:
            tensors = map_file(partial, state, about)
            weights.read(tensors)
            for name, tensor in tensors.items():
                check_finite(weights.path, name, tensor)
            sync(partial)
    return out.stat().st_size
