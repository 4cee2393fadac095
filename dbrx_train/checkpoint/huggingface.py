"""Weights out to a folder that transformers loads, and in from one; neither is ever whole in memory."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from dbrx_train import __version__
from dbrx_train.checkpoint import folder as folders
from dbrx_train.checkpoint.lineage import Lineage
from dbrx_train.checkpoint.model_card import model_card
from dbrx_train.checkpoint.weights import MANIFEST, Weights, meta_model, open_weights, tokenizer_of
from dbrx_train.errors import check_exists
from dbrx_train.lease import new_folder
from dbrx_train.model.config import DbrxConfig
from dbrx_train.model.hf.files import MAX_SHARD_BYTES, outline, sync, write, write_json
from dbrx_train.model.hf.names import identity, table

if TYPE_CHECKING:
    from dbrx_train.data.tokenizer import Tokenizer

__all__ = ["CARD", "MANIFEST", "check_exportable", "export", "import_folder"]

CARD = "README.md"
"""Of an export, for people and for Hugging Face's hub."""


def import_folder(path: Path, out: Path, max_shard_bytes: int = MAX_SHARD_BYTES) -> int:
    """Write the weights of a Hugging Face folder as a checkpoint to begin from, in their dtype.

    Returns its size in bytes.

    Raises:
        ValueError: ``path`` is no such folder or its weights do not fit its config.json; ``out`` exists.
    """
    check_exists(path)
    if not (path / "config.json").is_file():
        raise ValueError(f"{path}: no Hugging Face folder; must hold config.json")
    weights = open_weights(path, _unheard)
    state = dict(meta_model(weights.model).named_parameters())
    parts = identity({name: tuple(tensor.shape) for name, tensor in state.items()})
    with new_folder(out) as partial:
        tensors = outline(parts, state, weights.dtypes)
        names = write(
            partial,
            parts,
            tensors,
            lambda name: weights.whole(name, state[name], weights.dtypes[name]),
            max_shard_bytes,
        )
        files = {name: folders.fingerprint(partial / name) for name in names}
        time = {"batch": 0, "token": 0}
        facts = {"config": weights.config, "data": {}, "time": time, "files": files}
        if weights.lineage is not None:
            facts["base"] = weights.lineage.to_dict()
        folders.commit(partial, facts | {"tokenizer": weights.tokenizer_fingerprint})
    return _size(files)


def export(
    path: Path,
    out: Path,
    dtype: torch.dtype,
    on_skip: Callable[[str], None],
    max_shard_bytes: int = MAX_SHARD_BYTES,
) -> int:
    """Write what ``open_weights`` opens as a folder that transformers loads; returns its size in bytes.

    With DBRX's tokenizer, as files that need no code, if the model has a row for each of its ids.

    Raises:
        ValueError: there are no weights, transformers' class has no place for a feature, or ``out`` exists.
    """
    with open_weights(path, on_skip) as weights:
        model = weights.model
        check_exportable(model)
        tokenizer = _tokenizer(weights)  # before hours of writing, for it may not be there
        state = dict(meta_model(model).named_parameters())
        parts = table(model, {name: tuple(tensor.shape) for name, tensor in state.items()})
        tensors = outline(parts, state, dict.fromkeys(state, dtype))
        with new_folder(out) as partial:
            names = write(
                partial, parts, tensors, lambda name: weights.whole(name, state[name], dtype), max_shard_bytes
            )
            write_json(
                partial / "config.json", model.to_hf() | {"torch_dtype": str(dtype).removeprefix("torch.")}
            )
            card = model_card(model, weights.lineage or Lineage(str(weights.path.absolute())))
            (partial / CARD).write_text(card, encoding="utf-8")
            names += ["config.json", CARD, *_write_tokenizer(partial, tokenizer, model)]
            files = {name: folders.fingerprint(partial / name) for name in names}
            known = tokenizer and {"name": tokenizer.name, "fingerprint": tokenizer.fingerprint}
            facts = {"made_by": f"dbrx-train {__version__}", "tokenizer": known, "files": files}
            if weights.lineage is not None:
                facts["lineage"] = weights.lineage.to_dict()
            write_json(partial / MANIFEST, folders.sealed(facts))
            sync(partial / MANIFEST)
    return _size(files)


def check_exportable(model: DbrxConfig) -> None:
    """Raise ValueError, with the option's key, for a feature that transformers' class has no place for."""
    try:
        model.to_hf()
    except ValueError as error:
        raise ValueError(f"model.{error}") from None


def _tokenizer(weights: Weights) -> Tokenizer | None:
    """The run's, if it is known and the model has a row for each of its ids."""
    tokenizer = tokenizer_of(weights)
    return None if tokenizer is None or weights.model.vocab_size < tokenizer.n_vocab else tokenizer


def _write_tokenizer(folder: Path, tokenizer: Tokenizer | None, model: DbrxConfig) -> list[str]:
    """The tokenizer's files and the generation defaults that name its tokens."""
    from dbrx_train.data.tokenizer_json import write_tokenizer

    if tokenizer is None:
        return []
    names = write_tokenizer(folder, tokenizer, model.max_seq_len)
    generation = {
        "bos_token_id": tokenizer.eos_id,
        "eos_token_id": list(tokenizer.stop_ids),
        "pad_token_id": tokenizer.pad_id,
    }
    write_json(folder / "generation_config.json", generation)
    return [*names, "generation_config.json"]


def _size(files: dict[str, dict[str, Any]]) -> int:
    return sum(folders.size_of(facts) for facts in files.values())


def _unheard(line: str) -> None:
    raise AssertionError(line)
