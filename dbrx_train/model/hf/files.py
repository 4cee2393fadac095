"""Weights at rest in safetensors (or older .bin) files: read by rows, written tensor by tensor.

Files are mapped into memory: nothing is read but what is asked for, and a model may be larger than the host.
"""

from __future__ import annotations

import errno
import json
import math
import os
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from dbrx_train.model.config import DbrxConfig
from dbrx_train.model.decoder import Dbrx
from dbrx_train.model.hf.names import Part, Table, table
from dbrx_train.model.hf.quantized import block_of, dequantize, is_of_activations, scales_of

SINGLE_FILE = "model.safetensors"
INDEX_FILE = "model.safetensors.index.json"
BIN_FILE = "pytorch_model.bin"
MAX_SHARD_BYTES = 5 * 10**9
FLOAT8 = (torch.float8_e4m3fn, torch.float8_e5m2)
DTYPES = {torch.float32: "F32", torch.bfloat16: "BF16", torch.float16: "F16"}

_CHECKED_AT_ONCE = 2**24  # values; what is not finite is looked for in pieces, so that it takes no memory


def load(model_class: type[Dbrx], folder: str | os.PathLike[str], dtype: torch.dtype | None = None) -> Dbrx:
    """Build the model of a folder's config.json and fill it from its weights.

    dtype: that of the weights; None keeps that of the stored head. Peak memory is the model's.
    Raises ValueError, naming every missing, unexpected or misshapen tensor at once.
    """
    folder = Path(folder)
    config = DbrxConfig.from_hf(folder)
    with torch.device("meta"):
        model = model_class(config)
    shapes = {name: tuple(tensor.shape) for name, tensor in model.state_dict().items()}
    stored, parts = open_model(folder, config, shapes)
    stored.check(parts, shapes)
    model = model.to(dtype or stored.dtypes["lm_head.weight"]).to_empty(device="cpu")
    stored.fill(parts, {name: (tensor, 0) for name, tensor in model.state_dict().items()})
    return model


def save(model: Dbrx, folder: str | os.PathLike[str], max_shard_bytes: int = MAX_SHARD_BYTES) -> None:
    """Write config.json and safetensors, in several shards with an index above `max_shard_bytes`.

    Weights that an earlier save left in the folder are replaced. Raises ValueError for a model that the
    Hugging Face class cannot express.
    """
    config, state, folder = model.config.to_hf(), model.state_dict(), Path(folder)
    config["torch_dtype"] = str(state["lm_head.weight"].dtype).removeprefix("torch.")
    parts = table(model.config, {name: tuple(tensor.shape) for name, tensor in state.items()})
    folder.mkdir(parents=True, exist_ok=True)
    stale = {*folder.glob("model*.safetensors"), folder / INDEX_FILE}
    dtypes = {name: tensor.dtype for name, tensor in state.items()}
    files = write(folder, parts, outline(parts, state, dtypes), lambda name: state[name], max_shard_bytes)
    write_json(folder / "config.json", config)
    for path in stale - {folder / name for name in files}:
        path.unlink(missing_ok=True)


@dataclass(frozen=True)
class Stored:
    """Tensors in files, by name, none of which is in memory."""

    path: Path
    """The folder or file that messages name."""
    places: Mapping[str, Path]
    shapes: Mapping[str, tuple[int, ...]]
    dtypes: Mapping[str, torch.dtype]
    """Of what is in 8 bits with scales, bfloat16."""
    aliases: Mapping[str, str] = field(default_factory=dict)
    """Names that stand for another tensor."""
    scales: Mapping[str, str] = field(default_factory=dict)
    """Those of weights in 8 bits."""
    block: tuple[int, int] = (1, 1)
    """Rows and columns that share a scale, where these are a matrix."""

    def check(self, parts: Table, shapes: Mapping[str, tuple[int, ...]]) -> None:
        """Hold names, shapes and dtypes against those of the parameters in ``shapes``.

        Raises:
            ValueError: some do not fit; names all that do not.
        """
        wanted = {part.name: part.shape(shapes[ours]) for ours, all_of in parts.items() for part in all_of}
        troubles = [f"missing {name}" for name in wanted if name not in self.shapes]
        known = {*wanted, *self.scales.values()}
        troubles += [f"unexpected {name}" for name in self.shapes if name not in known]
        for name, shape in wanted.items():
            found, dtype = self.shapes.get(name, shape), self.dtypes.get(name, torch.float32)
            if found != shape:
                troubles.append(f"{name} is {list(found)}, must be {list(shape)}")
            if dtype not in DTYPES:
                accepted = ", ".join(str(d).removeprefix("torch.") for d in DTYPES)
                kind = (
                    f"{str(dtype).removeprefix('torch.')}{' without scales' if dtype.itemsize == 1 else ''}"
                )
                troubles.append(f"{name} is {kind}, must be one of {accepted}")
        if troubles:
            raise ValueError(f"{self.path}: does not fit its configuration: {'; '.join(troubles)}")

    def fill(self, parts: Table, wanted: Mapping[str, tuple[Tensor, int]]) -> None:
        """Read rows of parameters: ``wanted``: by name, a tensor and which row its first is.

        What is read is checked on the way, which costs a pass over memory.

        Raises:
            ValueError: a value is not finite.
        """
        jobs: dict[Path, list[tuple[Part, slice, Tensor]]] = {}
        for ours, (rows, first) in wanted.items():
            for part, source, target in _overlaps(parts[ours], rows, first):
                jobs.setdefault(self.places[part.name], []).append((part, source, target))
        for path in sorted(jobs):  # one at a time, so that pages of no other stay mapped
            tensors = open_tensors(path)
            for part, source, target in jobs[path]:
                values = self._values(tensors, part, source)
                self._check_finite(part, values)
                target.copy_(values)

    def _values(self, tensors: Mapping[str, Tensor], part: Part, source: slice) -> Tensor:
        """Rows of a part, of which ``tensors`` are the file's."""
        tensor = tensors[self.aliases.get(part.name, part.name)]
        scale = self.scales.get(part.name)
        if scale is None:
            return (tensor.T if part.transposed else tensor)[source]
        factors = open_tensors(self.places[scale])[scale]
        if part.transposed:
            return dequantize(tensor, factors, slice(0, tensor.shape[0]), source, self.block).T
        return dequantize(tensor, factors, source, slice(0, tensor.shape[1]), self.block)

    def _check_finite(self, part: Part, values: Tensor) -> None:
        values = values.T if part.transposed else values  # as it lies in the file
        check_finite(self.places[part.name], part.name, values)

    def check_finite(self) -> int:
        """Read everything; returns its size in bytes. Raises as ``fill``."""
        size = 0
        for path in sorted(set(self.places.values())):
            for name, tensor in open_tensors(path).items():
                check_finite(path, name, tensor)
                size += tensor.nbytes
        return size


def check_finite(path: Path, name: str, values: Tensor) -> None:
    """Raise ValueError if a value of a tensor, which ``path`` holds under ``name``, is not finite."""
    values = values if values.ndim else values[None]
    step = max(1, _CHECKED_AT_ONCE // max(1, math.prod(values.shape[1:])))
    for begin in range(0, len(values), step):
        piece = values[begin : begin + step]
        piece = piece.float() if piece.dtype in FLOAT8 else piece
        low, high = torch.aminmax(piece)  # both are NaN if any value is
        if not torch.isfinite(low) or not torch.isfinite(high):
            raise ValueError(f"{path}: {name} holds values that are not finite")


def _overlaps(parts: Iterable[Part], rows: Tensor, first: int) -> Iterator[tuple[Part, slice, Tensor]]:
    """The parts that meet ``rows``, which begin at row ``first`` of the whole: their rows, and ours."""
    begin = 0
    for part in parts:
        low, high = max(begin, first), min(begin + part.rows, first + len(rows))
        if low < high:
            yield part, slice(low - begin, high - begin), rows[low - first : high - first]
        begin += part.rows


def open_folder(folder: Path) -> Stored:
    """The weights of a Hugging Face folder: safetensors or .bin, single or by an index.

    Raises:
        ValueError: there are none, or a file is missing or damaged.
    """
    for single in (folder / SINGLE_FILE, folder / BIN_FILE):
        index = single.with_name(f"{single.name}.index.json")
        if single.is_file():
            return open_files(folder, [single])
        if index.is_file():
            try:
                places = json.loads(index.read_text(encoding="utf-8"))["weight_map"]
                files = sorted(set(places.values()))
            except (ValueError, KeyError, AttributeError, TypeError) as error:
                raise ValueError(f"{index}: is damaged; must hold a JSON object with a weight_map") from error
            check_names(index, files)
            stored = open_files(folder, [folder / name for name in files], index)
            _check_index(index, places, stored)
            return stored
    raise ValueError(f"{folder}: holds no weights; must have {SINGLE_FILE} or {INDEX_FILE}")


def open_model(
    folder: Path, config: DbrxConfig, shapes: Mapping[str, tuple[int, ...]]
) -> tuple[Stored, Table]:
    """The weights of a Hugging Face folder, and where the parameters of ``shapes`` are among them.

    Buffers of rotary embeddings and scales of activations are passed over. A head that is tied to the
    embedding is the embedding once more; weights in float8 with scales are multiplied by these when they are
    read. Raises as ``open_folder``.
    """
    stored, parts = open_folder(folder), table(config, shapes)
    hf = json.loads((folder / "config.json").read_text(encoding="utf-8"))
    dropped = {
        name for name in stored.shapes if name.endswith("rotary_emb.inv_freq") or is_of_activations(name)
    }
    aliases = {}
    if hf.get("tie_word_embeddings"):
        (head,), (embedding,) = parts["lm_head.weight"], parts["transformer.wte.weight"]
        if embedding.name in stored.shapes:  # transformers does not look at a head that is there, too
            aliases[head.name] = embedding.name
    kept = {name: name for name in stored.shapes if name not in dropped} | aliases
    scales = scales_of(kept, stored.dtypes)
    dtypes = {name: stored.dtypes[of] for name, of in kept.items()}
    plain = replace(
        stored,
        places={name: stored.places[of] for name, of in kept.items()},
        shapes={name: stored.shapes[of] for name, of in kept.items()},
        dtypes=dtypes | dict.fromkeys(scales, torch.bfloat16),
        aliases=aliases,
        scales=scales,
        block=block_of(hf),
    )
    return plain, parts


def open_files(path: Path, files: Iterable[Path], index: Path | None = None) -> Stored:
    """The tensors in some files; ``path`` and ``index`` (which listed them) are what messages name."""
    found: dict[str, tuple[Path, Tensor]] = {}
    for file in files:
        if not file.is_file():
            raise ValueError(f"{file}: is missing{f', though {index.name} names it' if index else ''}")
        for name, tensor in open_tensors(file).items():
            if name in found:
                raise ValueError(f"{file}: holds {name}, which {found[name][0].name} holds too")
            found[name] = file, tensor.to("meta")
    return Stored(
        path,
        {name: file for name, (file, _) in found.items()},
        {name: tuple(tensor.shape) for name, (_, tensor) in found.items()},
        {name: tensor.dtype for name, (_, tensor) in found.items()},
    )


def check_names(path: Path, names: Iterable[Any]) -> None:
    """Raise ValueError for one that is not a file's beside ``path``, which lists them."""
    for name in names:
        if not isinstance(name, str) or name != os.path.basename(name) or name in ("", ".", ".."):
            raise ValueError(f"{path}: names {name!r}; must name files beside it alone")


def _check_index(index: Path, places: Mapping[str, str], stored: Stored) -> None:
    found = {name: file.name for name, file in stored.places.items()}
    troubles = [
        f"{name} is in {found.get(name, 'none')}, not in {places.get(name, 'none')}"
        for name in sorted(places.keys() | found.keys())
        if places.get(name) != found.get(name)
    ]
    if troubles:
        raise ValueError(f"{index}: is not of the files beside it: {'; '.join(troubles)}")


def open_tensors(file: Path) -> dict[str, Tensor]:
    """The tensors of one file, mapped: bytes are read when they are used.

    Raises:
        ValueError: it is not whole, or holds anything but tensors.
    """
    if file.suffix != ".bin":
        try:
            opened: Any = safe_open(file, framework="pt")
            return {name: opened.get_tensor(name) for name in opened.keys()}  # noqa: SIM118 (not a dict)
        except OSError as error:
            raise ValueError(f"{file}: cannot be read ({error})") from error
        except SafetensorError as error:
            raise ValueError(f"{file}: is not a whole safetensors file ({error})") from error
    with file.open("rb") as opened:
        zipped = opened.read(4) == b"PK\x03\x04"  # else of torch before 1.6, which cannot be mapped
    try:
        tensors = torch.load(file, map_location="cpu", weights_only=True, mmap=zipped)
    except OSError:
        raise
    except Exception as error:  # a damaged pickle fails in many ways
        line = (str(error).strip() or type(error).__name__).splitlines()[0]
        line = "truncated" if isinstance(error, EOFError) or "central directory" in line else line
        raise ValueError(f"{file}: is not a whole file of tensors that torch.save wrote ({line})") from error
    if not isinstance(tensors, dict) or not all(isinstance(t, Tensor) for t in tensors.values()):
        raise ValueError(f"{file}: must hold tensors by name")
    return tensors


def outline(
    parts: Table, state: Mapping[str, Tensor], dtypes: Mapping[str, torch.dtype]
) -> dict[str, Tensor]:
    """The tensors that parameters become, by their names there, on the meta device.

    state: shapes; dtypes: what each parameter is to be stored in.
    """
    return {
        part.name: torch.empty(part.shape(tuple(state[ours].shape)), dtype=dtypes[ours], device="meta")
        for ours, all_of in parts.items()
        for part in all_of
    }


def write(
    folder: Path,
    parts: Table,
    tensors: Mapping[str, Tensor],
    whole: Callable[[str], Tensor],
    max_shard_bytes: int = MAX_SHARD_BYTES,
) -> list[str]:
    """Write safetensors, in several shards with an index above `max_shard_bytes`; returns the files' names.

    tensors: as ``outline`` gives them. whole: one of our parameters by name; asked for one at a time.
    """
    from huggingface_hub import split_state_dict_into_shards_factory

    plan = split_state_dict_into_shards_factory(
        dict(tensors),
        get_storage_size=lambda tensor: tensor.nbytes,
        filename_pattern="model{suffix}.safetensors",
        max_shard_size=max_shard_bytes,
    )
    files = list(plan.filename_to_tensors)
    for file, names in plan.filename_to_tensors.items():
        partial = folder / f"{file}.partial"  # so that a torn write never looks like weights
        targets = map_file(partial, {name: tensors[name] for name in names})
        for ours, all_of in parts.items():
            if any(part.name in targets for part in all_of):
                rows = whole(ours)
                for part, _, values in _overlaps(all_of, rows, 0):
                    if part.name in targets:
                        targets[part.name].copy_(values.T if part.transposed else values)
        del targets
        sync(partial)
        partial.replace(folder / file)
    if plan.is_sharded:
        write_json(
            folder / INDEX_FILE, {"metadata": plan.metadata, "weight_map": dict(plan.tensor_to_filename)}
        )
        files.append(INDEX_FILE)
    return files


def map_file(
    path: Path, tensors: Mapping[str, Tensor], metadata: Mapping[str, str] | None = None
) -> dict[str, Tensor]:
    """Tensors like the given ones, in a new safetensors file: what is written to them is written to it."""
    header: dict[str, Any] = {"__metadata__": {"format": "pt", **(metadata or {})}}
    places, end = {}, 0
    for name in sorted(
        tensors, key=lambda name: -tensors[name].itemsize
    ):  # wide ones first, so all are aligned
        tensor = tensors[name]
        begin, end = end, end + tensor.nbytes
        places[name] = begin, end
        header[name] = {
            "dtype": DTYPES[tensor.dtype],
            "shape": list(tensor.shape),
            "data_offsets": [begin, end],
        }
    text = json.dumps(header).encode()
    text += b" " * (-len(text) % 8)  # as the format advises
    size = 8 + len(text) + end
    with path.open("wb") as file:
        file.write(len(text).to_bytes(8, "little") + text)
        file.flush()
        _reserve(path, file.fileno(), size)
        file.truncate(size)
    data = torch.from_file(str(path), shared=True, size=size, dtype=torch.uint8)[8 + len(text) :]
    return {
        name: data[slice(*places[name])].view(tensor.dtype).view(tensor.shape)
        for name, tensor in tensors.items()
    }


def _reserve(path: Path, descriptor: int, size: int) -> None:
    """Claim a mapped file's room on the disk, which, if full, would kill the process later."""
    if not hasattr(os, "posix_fallocate"):
        return
    try:
        os.posix_fallocate(descriptor, 0, size)
    except OSError as error:
        if error.errno not in (errno.EOPNOTSUPP, errno.EINVAL):  # file systems that cannot
            raise OSError(error.errno, error.strerror, str(path)) from error


def sync(path: Path) -> None:
    """Wait until a file is on the disk."""
    with path.open("rb") as file:
        os.fsync(file.fileno())


def write_json(path: Path, content: object) -> None:
    path.write_text(json.dumps(content, indent=2) + "\n", encoding="utf-8")
