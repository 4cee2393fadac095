"""Is everything there, and as it was written? Of checkpoints and of Hugging Face folders."""

from __future__ import annotations

import json
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch.distributed.checkpoint.metadata import Metadata, TensorStorageMetadata

from dbrx_train.checkpoint import folder as folders
from dbrx_train.checkpoint.adapter import is_adapter
from dbrx_train.checkpoint.huggingface import MANIFEST
from dbrx_train.checkpoint.tensors import Reader, model_tensors
from dbrx_train.checkpoint.weights import meta_model, open_weights
from dbrx_train.errors import check_exists, first_line
from dbrx_train.model.config import DbrxConfig
from dbrx_train.model.hf.files import check_finite, open_files, open_folder, open_model
from dbrx_train.model.hf.names import identity
from dbrx_train.model.lora import apply_lora

__all__ = ["Verified", "verify"]


@dataclass(frozen=True)
class Verified:
    """What was found whole."""

    path: Path
    files: int
    bytes: int
    tensors: int
    hashed: bool
    """Contents were held against hashes, not sizes alone."""
    origin: str | None = None
    """What made it, where that is known."""

    def __str__(self) -> str:
        how = "sizes and hashes as written" if self.hashed else "sizes alone checked, for no hashes were kept"
        whole = f"{self.path}: whole: {self.files} files, {self.bytes:,} bytes, {self.tensors} tensors; {how}"
        return whole if self.origin is None else f"{whole}\n  {self.origin}"


def verify(path: Path) -> list[Verified]:
    """Account for every file and tensor of a checkpoint, a run, a Hugging Face folder or a weights file.

    Raises:
        ValueError: names the first file or tensor that is not as it should be, or there is nothing of these.
    """
    check_exists(path)
    if path.is_file():
        open_weights(path, _unheard)  # holds names and shapes against its configuration
        stored = open_files(path, [path])
        return [Verified(path, 1, stored.check_finite(), len(stored.shapes), hashed=False)]
    if (path / "config.json").is_file():
        return [_hugging_face(path)]
    if (path / folders.MANIFEST).exists():
        found = [path]
    else:
        found = folders.saved(path) or folders.saved(path / "checkpoints")
    # A run may be pruning: what is gone before it is held is not there to be verified.
    verified = []
    for each in found:
        if (hold := folders.hold(each)) is not None:
            with hold:
                verified.append(_checkpoint(each))
    if not verified:
        raise ValueError(f"{path}: neither a run with checkpoints nor a checkpoint nor a Hugging Face folder")
    return verified


def _checkpoint(path: Path) -> Verified:
    facts = folders.parse(path)
    files = facts["files"]
    _check_files(path, files, folders.MANIFEST)
    model = meta_model(DbrxConfig.from_dict(facts["config"]["model"]))
    if is_adapter(facts["config"]):
        lora = facts["config"]["lora"]
        apply_lora(model, lora["rank"], lora["alpha"], lora["targets"])
    saved = model_tensors(model)
    shapes = {name.removeprefix("model."): tuple(tensor.shape) for name, tensor in saved.items()}
    if ".metadata" in files:
        tensors = _check_parts(path, shapes, files)
    else:  # imported
        stored = open_folder(path)
        stored.check(identity(shapes), shapes)
        stored.check_finite()
        tensors = len(stored.shapes)
    return replace(_result(path, files, tensors), origin=_origin(facts))


def _origin(facts: dict[str, Any]) -> str | None:
    """What a manifest says of the run that saved it; older ones do not."""
    if "made_by" not in facts:
        return None
    time, made = facts["time"], facts["made_by"]
    mesh, versions = made["mesh"], made["versions"]
    packages = ", ".join(f"{name} {versions[name]}" for name in ("dbrx-train", "torch", "mosaicml"))
    digests = {"configuration": made["config"], **made["data"]}
    run = facts["config"]["run_name"]
    mesh = f"{mesh['replicate']} x {mesh['shard']} ranks, experts over {mesh['expert']}"
    prints = ", ".join(f"{name} {digest[:12]}" for name, digest in digests.items())
    seen = f"{run}, step {time['batch']:,}, {time['token']:,} tokens"
    return f"{seen}; on {mesh}; {packages}; fingerprints: {prints}"


def _check_parts(path: Path, shapes: dict[str, tuple[int, ...]], files: dict[str, Any]) -> int:
    """Every tensor of the model is there, and every value of all tensors, within what was written, finite."""
    reader = Reader(path)
    metadata: Metadata = reader.read_metadata()
    for name, shape in shapes.items():
        found = reader.shapes.get(f"model.{name}")
        if found is None or tuple(found[0]) != shape:
            what = f"has shape {list(found[0])}, not" if found else "is missing; must have shape"
            raise ValueError(f"{path}: model.{name} {what} {list(shape)}")
    places = metadata.storage_data or {}
    for name, tensor in metadata.state_dict_metadata.items():
        assert isinstance(tensor, TensorStorageMetadata)
        there = sum(chunk.sizes.numel() for chunk in tensor.chunks)
        if there != tensor.size.numel():
            raise ValueError(f"{path}: of {name}, {there:,} of {tensor.size.numel():,} values are there")
    for index, place in places.items():
        if place.offset + place.length > folders.size_of(files.get(place.relative_path, 0)):
            raise ValueError(f"{path}: {index.fqn} lies beyond the end of {place.relative_path}")
    for name, (size, dtype) in reader.shapes.items():
        if dtype.is_floating_point:
            values = torch.empty(size, dtype=dtype)
            reader.read({name: values})
            check_finite(path, name, values)
    return len(metadata.state_dict_metadata)


def _hugging_face(path: Path) -> Verified:
    files: dict[str, Any] = {}
    if (path / MANIFEST).is_file():
        try:
            files = folders.unsealed(json.loads((path / MANIFEST).read_text(encoding="utf-8")))["files"]
            folders.check_listed(path / MANIFEST, files)
        except (ValueError, KeyError, TypeError, AttributeError) as error:
            raise ValueError(f"{path / MANIFEST}: cannot be read ({first_line(error)})") from None
        _check_files(path, files, MANIFEST)
    config = DbrxConfig.from_hf(path)
    shapes = {name: tuple(tensor.shape) for name, tensor in meta_model(config).state_dict().items()}
    stored, parts = open_model(path, config, shapes)
    stored.check(parts, shapes)
    stored.check_finite()
    found = files or {file.name: file.stat().st_size for file in {*stored.places.values()}}
    return _result(path, found, len(stored.shapes))


def _check_files(path: Path, files: dict[str, Any], manifest: str) -> None:
    for name, facts in files.items():
        folders.check_file(path / name, facts)
    for file in sorted(path.iterdir()):
        hubs = file.name.startswith((".git", ".cache", "README"))  # of a model hub's own
        if file.name not in files and file.name != manifest and not hubs:
            raise ValueError(f"{file}: is not one of the files that {manifest} lists")


def _unheard(line: str) -> None:
    raise AssertionError(line)


def _result(path: Path, files: dict[str, Any], tensors: int) -> Verified:
    size = sum(map(folders.size_of, files.values()))
    hashed = bool(files) and all(isinstance(facts, dict) for facts in files.values())
    return Verified(path, len(files), size, tensors, hashed)
