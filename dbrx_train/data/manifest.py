"""``manifest.json``: what a prepared folder holds, and the mark that it is whole.

Layout of a prepared folder::

    DIR/manifest.json                        written last
    DIR/train/index.json                     MDS index over all of the split's shards
    DIR/train/00000/shard.00000.mds.zstd     shards of the first part of the input, and so on
    DIR/train/00000/documents.npz            from which documents they are
    DIR/train/rest/shard.00000.mds.zstd      samples packed from what the parts had left over
    DIR/val/…                                likewise, if documents were held out
    DIR/inputs.jsonl                         the raw files, with their size and hash
    DIR/curation-….json                      the reports of curations that these came from
"""

from __future__ import annotations

import json
import os
import tempfile
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field, fields
from pathlib import Path
from typing import Any

import xxhash

from dbrx_train.data.governance import Governance
from dbrx_train.data.inputs import Curation, Inputs
from dbrx_train.data.untrusted import check_shard
from dbrx_train.errors import seen_from
from dbrx_train.files import seal

__all__ = [
    "MANIFEST",
    "WORK",
    "Manifest",
    "Problem",
    "Split",
    "check_dataset",
    "check_held_out",
    "fetch",
    "read_manifest",
    "write_json",
    "write_manifest",
]

MANIFEST = "manifest.json"
VERSION = 1
WORK = ".prepare"
"""The sub-folder of a preparation that is not done."""


@dataclass(frozen=True)
class Split:
    """What one split holds.

    ``tokens`` counts the end-of-text token of each document; ``samples`` of them have ``seq_len`` tokens
    each, and the ``dropped_tokens`` at the very end, fewer than ``seq_len``, are in no sample.
    ``text_bytes`` is the UTF-8 size of the documents, ``lengths[i]`` the number of documents of
    [2^i, 2^(i+1)) tokens. Of conversations, none is dropped for want of tokens, and samples are padded.
    ``index`` is the XXH3 of the split's index; older manifests have none.
    """

    documents: int
    tokens: int
    samples: int
    dropped_tokens: int
    text_bytes: int
    lengths: list[int]
    index: str | None = None


@dataclass(frozen=True)
class Problem:
    """Trouble that was mended: how often, and where first (``FILE`` or ``FILE:LINE``)."""

    count: int
    examples: list[str]


@dataclass(frozen=True)
class Manifest:
    """All of ``manifest.json``. Equal input and options give an equal file, whoever wrote it."""

    version: int
    tokenizer: str
    tokenizer_fingerprint: str
    vocab_size: int
    options: dict[str, Any]
    sources: list[dict[str, Any]]
    splits: dict[str, Split]
    problems: dict[str, Problem]
    governance: Governance = field(default_factory=Governance)
    inputs: Inputs | None = None
    """Of the raw files; older manifests do not know them."""
    curation: list[Curation] = field(default_factory=list)

    @property
    def seq_len(self) -> int:
        """Tokens of each sample."""
        return int(self.options["seq_len"])

    @property
    def chat(self) -> dict[str, Any] | None:
        """How conversations were read (``ChatFormat``'s fields); None for text."""
        return self.options.get("chat")

    def check_length(self, folder: str | os.PathLike[str], seq_len: int | None) -> None:
        """Raise ValueError, naming ``folder``, if a run asks for samples of another length."""
        if seq_len not in (None, self.seq_len):
            raise ValueError(
                f"{folder}: prepared with samples of {self.seq_len} tokens, but the run asks for {seq_len}; "
                f"set the run's sequence length to {self.seq_len}, or prepare again with --seq-len {seq_len}"
            )


def read_manifest(folder: str | os.PathLike[str]) -> Manifest:
    """The manifest of a prepared folder.

    Raises:
        ValueError: the folder is missing, empty or half written, or its manifest is damaged.
    """
    path = Path(folder, MANIFEST)
    if not path.parent.is_dir():
        raise ValueError(
            f"{folder}: no such folder{seen_from(folder)}; make it with `dbrx-train data prepare`"
        )
    if not path.is_file():
        raise ValueError(f"{folder}: {_without_manifest(path.parent)}")
    try:
        values = json.loads(path.read_text(encoding="utf-8"))
        if values.pop("seal", None) not in (None, seal(values)):
            raise ValueError("damaged: its content is not what was written")
        if values["version"] != VERSION:
            raise ValueError(f"version {values['version']}; this program reads version {VERSION}")
        values["splits"] = {name: Split(**split) for name, split in values["splits"].items()}
        values["problems"] = {kind: Problem(**problem) for kind, problem in values["problems"].items()}
        values["governance"] = Governance(**values.get("governance", {}))
        values["inputs"] = Inputs(**values["inputs"]) if values.get("inputs") else None
        values["curation"] = [Curation(**each) for each in values.get("curation", [])]
        return Manifest(**{each.name: values[each.name] for each in fields(Manifest)})
    except (ValueError, TypeError, KeyError) as error:
        raise ValueError(f"{path}: no manifest of a prepared folder ({error})") from error


def _without_manifest(folder: Path) -> str:
    """What a folder is that has no manifest, and what would be right."""
    names = sorted(entry.name for entry in folder.iterdir())
    if not names:
        return f"empty, it has no {MANIFEST}; run `dbrx-train data prepare` to its end"
    if WORK in names or "train" in names:
        return f"half written, it has no {MANIFEST}; run `dbrx-train data prepare` to its end"
    return (
        f"holds no prepared data, but {names[0]}; make some of it with `dbrx-train data prepare {folder} "
        f"--out DIR`, and name DIR"
    )


def write_manifest(folder: str | os.PathLike[str], manifest: Manifest) -> None:
    """Write ``manifest.json`` in one step: from then on the folder counts as whole."""
    values = asdict(manifest)
    write_json(Path(folder, MANIFEST), values | {"seal": seal(values)}, indent=2)


def write_json(path: Path, value: Mapping[str, Any], indent: int | None = None) -> None:
    """Write JSON so that ``path`` is there whole or not at all, even after a power failure."""
    partial = path.with_name(f"{path.name}.tmp")
    with open(partial, "w", encoding="utf-8") as file:
        json.dump(value, file, indent=indent, sort_keys=True)
        file.flush()
        os.fsync(file.fileno())
    os.replace(partial, path)


def fetch(remote: str, path: Path) -> None:
    """Copy the file ``remote``, of any kind that streaming can download, over ``path`` in one step.

    Raises:
        ValueError: it cannot be had, or ``path`` cannot be written.
    """
    from streaming.base.storage.download import CloudDownloader
    from streaming.base.util import retry

    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(prefix=f"{path.name}.", dir=path.parent) as folder:
            copy = os.path.join(folder, path.name)
            retry(num_attempts=2)(lambda: CloudDownloader.direct_download(remote, copy))()
            os.replace(copy, path)
    except Exception as error:  # every cloud's SDK has errors of its own
        reason = " ".join(str(error).split()) or type(error).__name__
        raise ValueError(f"{remote}: cannot be fetched to {path} ({reason})") from error


def digest(folder: str | os.PathLike[str]) -> str:
    """XXH3 of a folder's manifest, byte for byte."""
    return xxhash.xxh3_128_hexdigest(Path(folder, MANIFEST).read_bytes())


def check_dataset(
    folder: str | os.PathLike[str],
    seq_len: int | None,
    tokenizer_fingerprint: str | None = None,
    vocab_size: int | None = None,
    split: str = "train",
    remote: str | None = None,
) -> Manifest:
    """Make sure that a run can read ``folder``: whole, and of this sequence length and tokenizer.

    Looks at the size of every shard but reads none. Of a ``remote`` folder the manifest and the split's
    index are fetched to ``folder`` and checked; no shard has to be there.

    Args:
        folder: a prepared folder, as ``data prepare`` left it.
        seq_len: tokens per sample that the run asks for, if it does.
        tokenizer_fingerprint: of the run's tokenizer, if it has to be the same one.
        vocab_size: rows of the run's embedding, if every id has to have one.
        split: the split that the run reads.
        remote: where the prepared folder lies, if it is to be fetched to ``folder``.

    Raises:
        ValueError: naming the folder, what is wrong with it, and what would be right.
    """
    if remote is not None:
        fetch(os.path.join(remote, MANIFEST), Path(folder, MANIFEST))
    manifest = read_manifest(folder)
    manifest.check_length(folder, seq_len)
    if tokenizer_fingerprint not in (None, manifest.tokenizer_fingerprint):
        raise ValueError(
            f"{folder}: prepared with another tokenizer, {manifest.tokenizer} "
            f"({manifest.tokenizer_fingerprint[:12]}…, the run's is {str(tokenizer_fingerprint)[:12]}…); "
            f"use that one, or prepare again"
        )
    if vocab_size is not None and vocab_size < manifest.vocab_size:
        raise ValueError(
            f"{folder}: holds ids up to {manifest.vocab_size - 1}, but the model's vocabulary has only "
            f"{vocab_size}; set it to at least {manifest.vocab_size}"
        )
    if split not in manifest.splits:
        raise ValueError(f"{folder}: has no split {split!r}, only {', '.join(manifest.splits)}")
    if remote is not None:
        fetch(os.path.join(remote, split, "index.json"), Path(folder, split, "index.json"))
    shards = _read_index(Path(folder, split), manifest.splits[split])
    if remote is None:
        _check_shards(Path(folder, split), shards)
    return manifest


def check_held_out(folder: str, seq_len: int | None, tokenizer_fingerprint: str, vocab_size: int) -> Manifest:
    """As ``check_dataset``, of a source's ``val``: a folder that is to hold held-out data alone.

    Raises:
        ValueError: it holds other data, too, which is as good as none of it.
    """
    try:
        if "train" in read_manifest(folder).splits:
            own = "prepare what is held out with `data prepare --split val`"
            raise ValueError(f"{folder} holds data to train on, too; {own}")
        return check_dataset(folder, seq_len, tokenizer_fingerprint, vocab_size, split="val")
    except ValueError as error:
        raise ValueError(f"val: {error}") from None


def _read_index(folder: Path, split: Split) -> list[dict[str, Any]]:
    try:
        content = (folder / "index.json").read_bytes()
        shards = json.loads(content)["shards"]
        found = sum(shard["samples"] for shard in shards)
    except FileNotFoundError as error:
        raise ValueError(f"{folder}: has no index.json; prepare it again") from error
    except (ValueError, TypeError, KeyError) as error:
        raise ValueError(f"{folder}/index.json: damaged ({error}); prepare the folder again") from error
    for shard in shards:
        check_shard(folder / "index.json", shard)
    if found != split.samples:
        raise ValueError(
            f"{folder}/index.json: lists {found} samples, the manifest {split.samples}; prepare again"
        )
    if split.index not in (None, xxhash.xxh3_128_hexdigest(content)):
        raise ValueError(f"{folder}/index.json: damaged (is not what was written); prepare the folder again")
    return list(shards)


def _check_shards(folder: Path, shards: list[dict[str, Any]]) -> None:
    for shard in shards:
        # Streaming unpacks shards next to the compressed ones: either will do
        forms = [form for form in (shard["zip_data"], shard["raw_data"]) if form]
        if not any(_size(folder / form["basename"]) == form["bytes"] for form in forms):
            raise ValueError(
                f"{folder / forms[0]['basename']}: missing or cut short; prepare the folder again"
            )


def _size(path: Path) -> int | None:
    return path.stat().st_size if path.is_file() else None
