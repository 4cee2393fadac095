"""The tensors of a checkpoint: each rank writes and reads its own parts, whatever mesh they come from.

Through torch.distributed.checkpoint, which knows a DTensor's place in the whole. Names are
``model.PARAMETER``, ``optimizer.PARAMETER.STATE`` and ``random.RANK``.
"""

from __future__ import annotations

import os
import pickle
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
import xxhash
from torch import Tensor, nn
from torch.distributed.checkpoint.api import CheckpointException
from torch.distributed.checkpoint.filesystem import FileSystem, FileSystemReader, FileSystemWriter
from torch.distributed.checkpoint.metadata import Metadata, TensorStorageMetadata
from torch.distributed.checkpoint.planner import LoadPlan, LoadPlanner, SavePlan, SavePlanner
from torch.distributed.checkpoint.staging import BlockingAsyncStager
from torch.distributed.checkpoint.state_dict_loader import load
from torch.distributed.checkpoint.state_dict_saver import save
from torch.distributed.fsdp import FSDPModule
from torch.distributed.tensor import DTensor

from dbrx_train.checkpoint.folder import fingerprint
from dbrx_train.errors import first_line
from dbrx_train.model.hf.files import check_names
from dbrx_train.model.init import is_norm
from dbrx_train.parallel.gather import gather_objects

__all__ = ["Reader", "Staging", "model_tensors", "optimizer_tensors", "own_share", "write"]

# All that a metadata file is made of. Anything else in one is not ours, and is not run.
_METADATA_TYPES = {
    "torch.distributed.checkpoint.metadata": (
        "ChunkStorageMetadata",
        "Metadata",
        "MetadataIndex",
        "StorageMeta",
        "TensorProperties",
        "TensorStorageMetadata",
        "_MEM_FORMAT_ENCODING",
    ),
    "torch.distributed.checkpoint.filesystem": ("_StorageInfo",),
    "torch": ("Size", "float32", "bfloat16", "float16", "float64", "int64", "int32", "uint8", "bool"),
    "torch.serialization": ("_get_layout",),
    "pathlib": ("PosixPath", "WindowsPath", "PurePosixPath"),
    "collections": ("OrderedDict",),
}


def model_tensors(model: nn.Module) -> dict[str, Tensor]:
    """Parameters and buffers, not copied.

    Of what is frozen, beside adapters, there are the norms alone: they are small, and tell weights apart.
    """
    frozen = {name for name, parameter in model.named_parameters() if not parameter.requires_grad}
    return {
        f"model.{name}": tensor
        for name, tensor in model.state_dict().items()
        if name not in frozen or is_norm(name)
    }


def optimizer_tensors(model: nn.Module, optimizer: torch.optim.Optimizer) -> dict[str, Tensor]:
    """The optimizer's state for each parameter that it moves, not copied; made first if there is none yet."""
    for module in model.modules():
        if isinstance(module, FSDPModule):
            module.reshard()  # the optimizer knows shards, not what a forward pass may have left gathered
    if not optimizer.state:
        _make_state(optimizer)
    return {
        f"optimizer.{name}.{key}": value
        for name, parameter in model.named_parameters()
        if parameter.requires_grad
        for key, value in optimizer.state[parameter].items()
    }


@torch.no_grad()
def _make_state(optimizer: torch.optim.Optimizer) -> None:
    """A step of length 0, taken back: the state has its tensors, and all else is as it was."""
    rates = [group["lr"] for group in optimizer.param_groups]
    grads = {p: p.grad for group in optimizer.param_groups for p in group["params"]}
    for group in optimizer.param_groups:
        group["lr"] = 0.0
    for parameter in grads:
        parameter.grad = torch.zeros_like(parameter)
    optimizer.step()
    for parameter, grad in grads.items():
        parameter.grad = grad
        if "step" in optimizer.state[parameter]:
            optimizer.state[parameter]["step"].zero_()
    for group, rate in zip(optimizer.param_groups, rates, strict=True):
        group["lr"] = rate


def write(
    folder: Path, tensors: dict[str, Tensor], group: dist.ProcessGroup | None
) -> dict[str, dict[str, Any]]:
    """Write the ranks' tensors; returns the files with their sizes and hashes, the same on every rank.

    Each rank hashes what it writes on its way to the disk, so nothing is read again, and what the disk made
    of it can be told from what was meant. ``group``: of all ranks, None for the default one.

    Raises:
        OSError: a rank cannot write.
        RuntimeError: something else befell a rank while it wrote, such as a loader's worker that was killed.
    """
    # Copied by no stream of the thread that writes: it may be another than that which trains
    writer = _Writer(folder, per_thread_copy_ahead=0)
    try:
        save(tensors, storage_writer=writer, process_group=group)
    except CheckpointException as error:
        causes = [cause for cause, _ in error.failures.values()]
        for cause in causes:
            if isinstance(cause, OSError):
                raise OSError(cause.errno, cause.strerror, str(folder)) from error
        # torch's is a BaseException, which nobody who handles errors would catch
        raise RuntimeError(f"{folder}: {causes[0]}") from error
    mine = writer.files.written
    if not dist.is_initialized() or dist.get_rank(group) == 0:
        mine[".metadata"] = fingerprint(folder / ".metadata")
    return {name: facts for files in gather_objects(mine, group) for name, facts in files.items()}


def own_share(tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    """Of what several ranks hold alike, what this one is to write: replicas take the tensors in turn.

    Without it all that any rank holds would be planned for, and sorted out, on rank 0 alone.
    """
    if not dist.is_initialized():
        return tensors
    mine = {name: tensor for name, tensor in tensors.items() if name.startswith("random.")}  # of each rank
    alike = sorted(tensors.keys() - mine.keys())
    for number, name in enumerate(alike):
        tensor = tensors[name]
        copies, copy = 1, 0
        if isinstance(tensor, DTensor):
            mesh = tensor.device_mesh
            for axis, place in enumerate(tensor.placements):
                if place.is_replicate():
                    copies, copy = (
                        copies * mesh.size(axis),
                        copy * mesh.size(axis) + mesh.get_local_rank(axis),
                    )
        else:
            copies, copy = dist.get_world_size(), dist.get_rank()
        if number % copies == copy:
            mine[name] = tensor
    return mine


class Staging:
    """Copies of tensors in the host's memory, which training no longer changes until the next are made.

    Those of tensors on ``device_type`` are pinned, and kept for the next time: to pin memory takes longer
    than to copy into it.
    """

    def __init__(self, device_type: str = "cuda") -> None:
        self._device_type = device_type
        self._pinned = BlockingAsyncStager(cache_staged_state_dict=True)

    def copy(self, tensors: dict[str, Tensor]) -> dict[str, Tensor]:
        """To be called each time with the same names and shapes of tensors that are on the device."""
        there = {name: t for name, t in tensors.items() if t.device.type == self._device_type}
        here = {name: t for name, t in tensors.items() if name not in there}
        copies: dict[str, Tensor] = BlockingAsyncStager().stage(here)
        return copies | (self._pinned.stage(there) if there else {})


class _Writer(FileSystemWriter):
    def __init__(self, folder: Path, **options: Any) -> None:
        super().__init__(folder, **options)
        self.fs = self.files = _Hashing()

    def write_data(self, plan: SavePlan, planner: SavePlanner) -> Any:
        try:
            return super().write_data(plan, planner)
        except RuntimeError as error:
            # torch's report of a failed write. What led to it would not survive the way to the other ranks.
            cause: BaseException | None = error
            while cause is not None and not isinstance(cause, OSError):
                cause = cause.__cause__ or cause.__context__
            raise cause or error from None


class _Hashing(FileSystem):
    """Hashes files of tensors while they are written."""

    def __init__(self) -> None:
        self.written: dict[str, dict[str, Any]] = {}
        """What a manifest says of each."""

    @contextmanager
    def create_stream(self, path: str | os.PathLike[str], mode: str) -> Iterator[Any]:
        with super().create_stream(path, mode) as stream:
            if mode != "wb" or Path(path).suffix != ".distcp":
                yield stream
                return
            hashed = _Hashed(stream)
            yield hashed
            self.written[Path(path).name] = {"bytes": hashed.bytes, "xxh3": hashed.digest.hexdigest()}


class _Hashed:
    """A file that is written from its beginning to its end."""

    def __init__(self, stream: Any) -> None:
        self._stream, self.bytes, self.digest = stream, 0, xxhash.xxh3_128()
        self.flush, self.fileno, self.close = stream.flush, stream.fileno, stream.close

    def write(self, data: Any) -> int:
        self.digest.update(data)
        count: int = self._stream.write(data)
        self.bytes += count
        return count

    def tell(self) -> int:
        return self.bytes


class Reader(FileSystemReader):
    """Reads parts of the tensors in a checkpoint, without running code that may be in it.

    ``fetch`` is asked for each file, by its name, before it is opened.
    """

    def __init__(self, folder: Path, fetch: Callable[[str], None] = lambda name: None) -> None:
        super().__init__(folder)
        self._folder, self._fetch = folder, fetch
        self._metadata: Metadata | None = None

    def read_metadata(self) -> Metadata:
        """Raises ValueError if the metadata file is not what ``write`` left."""
        if self._metadata is None:
            self._fetch(".metadata")
            try:
                with (self._folder / ".metadata").open("rb") as file:
                    self._metadata = _checked(self._folder, _PlainUnpickler(file).load())
            except Exception as error:  # a damaged pickle fails in many ways
                raise ValueError(
                    f"{self._folder}: its metadata cannot be read ({first_line(error)})"
                ) from None
        return self._metadata

    @property
    def shapes(self) -> dict[str, tuple[torch.Size, torch.dtype]]:
        """Every tensor's whole shape and dtype, by name."""
        found = self.read_metadata().state_dict_metadata
        return {name: (meta.size, meta.properties.dtype) for name, meta in found.items()}  # type: ignore[union-attr]

    def read(self, tensors: dict[str, Tensor]) -> None:
        """Fill ``tensors`` (whole ones, or this rank's parts of DTensors), which keep their dtype.

        Raises:
            ValueError: one is missing or has another shape.
        """
        for name, tensor in tensors.items():
            if name not in self.shapes:
                raise ValueError(f"{self._folder}: has no tensor {name}")
            if self.shapes[name][0] != tensor.shape:
                shape = tuple(self.shapes[name][0])
                raise ValueError(f"{self._folder}: {name} has shape {shape}, not {tuple(tensor.shape)}")
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", "torch.distributed is disabled")  # each rank reads for itself
            load(tensors, storage_reader=self, no_dist=True)

    def read_data(self, plan: LoadPlan, planner: LoadPlanner) -> Any:
        for name in {self.storage_data[item.storage_index].relative_path for item in plan.items}:
            self._fetch(name)
        return super().read_data(plan, planner)


def _checked(folder: Path, metadata: Any) -> Metadata:
    """Raises ValueError for metadata that name anything but tensors in files of the folder.

    torch would unpickle what is not a tensor, and open whatever file is named.
    """
    if not isinstance(metadata, Metadata):
        raise ValueError("it is none")
    for name, found in metadata.state_dict_metadata.items():
        if not isinstance(found, TensorStorageMetadata):
            raise ValueError(f"{name} is no tensor")
    check_names(folder / ".metadata", {part.relative_path for part in (metadata.storage_data or {}).values()})
    return metadata


class _PlainUnpickler(pickle.Unpickler):
    def find_class(self, module: str, name: str) -> Any:
        if name in _METADATA_TYPES.get(module, ()):
            return super().find_class(module, name)
        raise pickle.UnpicklingError(f"{module}.{name} has no place in it")
