"""Raw inputs of a prepared folder: ``inputs.jsonl``, a line a file, and the curation that they came from."""

from __future__ import annotations

import json
import os
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import xxhash

from dbrx_train.files import atomic_write, fingerprint

__all__ = [
    "CURATION",
    "Curation",
    "InputFile",
    "Inputs",
    "curation_report",
    "keep_curations",
    "keep_inputs",
    "lists_of",
    "read_inputs",
]

INPUTS = "inputs.jsonl"
CURATION = "curation.json"
"""What ``data curate`` leaves beside its output: the recipe's digest, and what it read."""
_THREADS = 8
"""Files read at a time: where they lie on a network, opening one is mostly waiting."""


@dataclass(frozen=True)
class InputFile:
    """A raw file as it was when it was prepared."""

    path: str
    """As it was named or found, relative to where ``data prepare`` ran unless absolute."""
    bytes: int
    xxh3: str
    """XXH3 (128 bits) of its content."""


@dataclass(frozen=True)
class Inputs:
    """All raw files of a prepared folder, summed up."""

    files: int
    bytes: int
    xxh3: str
    """Of ``inputs.jsonl``."""


@dataclass(frozen=True)
class Curation:
    """The report of a curation whose output was prepared."""

    path: str
    """Where it lay."""
    xxh3: str
    """Of the report."""
    recipe: str | None
    """The digest of the recipe, as the report says it."""


def keep_inputs(folder: Path, paths: Sequence[str]) -> Inputs:
    """Hash the files and write ``inputs.jsonl`` into ``folder``.

    Raises:
        OSError: one cannot be read any more.
    """
    pool = ThreadPoolExecutor(_THREADS, "inputs")
    content, size = xxhash.xxh3_128(), 0
    try:
        with atomic_write(folder / INPUTS) as partial, partial.open("wb") as lines:
            for found in pool.map(_hashed, paths):
                line = json.dumps(asdict(found)).encode() + b"\n"
                lines.write(line)
                content.update(line)
                size += found.bytes
    finally:
        pool.shutdown(cancel_futures=True)
    return Inputs(len(paths), size, content.hexdigest())


def _hashed(path: str) -> InputFile:
    return InputFile(path, **fingerprint(Path(path)))


def read_inputs(folder: str | os.PathLike[str], known: Inputs) -> Iterator[InputFile]:
    """The raw files that ``inputs.jsonl`` lists.

    Raises:
        ValueError: it is missing, or not what the manifest knows it to be.
    """
    path = Path(folder, INPUTS)
    try:
        content = path.read_bytes()
    except OSError as error:
        raise ValueError(f"{path}: cannot be read ({error.strerror}); prepare the folder again") from None
    if xxhash.xxh3_128_hexdigest(content) != known.xxh3:
        raise ValueError(f"{path}: damaged (is not what was written); prepare the folder again")
    for line in content.splitlines():
        yield InputFile(**json.loads(line))


def keep_curations(folder: Path, given: Sequence[str], paths: Sequence[str]) -> list[Curation]:
    """Copy the curation reports that lie beside inputs into ``folder``, in the order of the inputs.

    Args:
        folder: the prepared one; a copy is called ``curation-DIGEST.json``.
        given: the sources as the user named them.
        paths: the files that they came to.

    Raises:
        ValueError: a report is no JSON object.
    """
    folders = list(dict.fromkeys(map(os.path.dirname, paths)))
    # A curated folder holds one for each source
    homes = [*(s for s in given if os.path.isdir(s)), *folders, *map(os.path.dirname, folders)]
    found = []
    for home in dict.fromkeys(map(os.path.normpath, homes)):
        path = os.path.join(home, CURATION)
        if not os.path.isfile(path):
            continue
        content = Path(path).read_bytes()
        digest = xxhash.xxh3_128_hexdigest(content)
        found.append(Curation(path, digest, _recipe(path, content)))
        with atomic_write(_copy(folder, found[-1])) as partial:
            partial.write_bytes(content)
    return found


def _recipe(path: str, content: bytes) -> str | None:
    try:
        recipe: str | None = json.loads(content).get("recipe_digest")
        return recipe
    except (ValueError, AttributeError) as error:
        raise ValueError(f"{path}: no report of a curation ({error}); curate again") from None


def _copy(folder: Path, curation: Curation) -> Path:
    return folder / f"curation-{curation.xxh3[:12]}.json"


def lists_of(inputs: Inputs | None, curation: Sequence[Curation]) -> list[str]:
    """The files of a prepared folder that say where it came from, by name."""
    return ([INPUTS] if inputs else []) + [_copy(Path(), each).name for each in curation]


def curation_report(folder: str | os.PathLike[str], curation: Curation) -> dict[str, Any]:
    """The report as it was when the folder was prepared; raises ValueError if the copy is not there."""
    path = _copy(Path(folder), curation)
    try:
        report: dict[str, Any] = json.loads(path.read_bytes())
        return report
    except (OSError, ValueError) as error:
        raise ValueError(f"{path}: cannot be read ({error}); prepare the folder again") from None
