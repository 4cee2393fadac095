"""Checkpoints on an object store, beside the local ones."""

from __future__ import annotations

import random
import time
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import Any, Protocol

from filelock import FileLock

from dbrx_train.checkpoint.folder import (
    MANIFEST,
    Checkpoint,
    fingerprint,
    parse,
    prunable,
    size_of,
    step_folder,
    step_of,
)

__all__ = ["WAITS", "ObjectStore", "Remote"]

WAITS = (1.0, 4.0, 16.0)
"""Seconds before each further try to copy a file."""


class ObjectStore(Protocol):
    """What is asked of a store; Composer's are ones."""

    def upload_object(self, object_name: str, filename: str) -> None: ...

    def download_object(self, object_name: str, filename: str, overwrite: bool = False) -> None: ...

    def list_objects(self, prefix: str | None = None) -> list[str]: ...


class Remote:
    """Checkpoints as objects ``prefix/ba1000/FILE``; one counts once its manifest is there."""

    def __init__(self, store: ObjectStore, prefix: str) -> None:
        self._store, self._prefix = store, prefix.strip("/")

    @property
    def place(self) -> tuple[ObjectStore, str]:
        """The store and the prefix in it."""
        return self._store, self._prefix

    def upload(self, folder: Path, names: Iterable[str]) -> None:
        """Copy files of a checkpoint; give its manifest last, when all ranks' files are there."""
        for name in names:
            _again(self._store.upload_object, self._object(folder.stem, name), str(folder / name))

    def withdraw(self, folder: Path) -> None:
        """Before a checkpoint is replaced: the manifest of one that is there no longer counts."""
        if MANIFEST in self._names(folder.stem):
            nothing = folder / f"{MANIFEST}.withdrawn"
            nothing.touch()
            self._store.upload_object(self._object(folder.stem, MANIFEST), str(nothing))
            nothing.unlink()

    def whole(self, root: Path, on_skip: Callable[[str], None]) -> Iterator[Checkpoint]:
        """The whole ones, newest first, as folders in ``root`` without tensors: ``fetch`` brings them.

        ``on_skip`` hears of others between them.
        """
        for step in self.steps():
            folder = step_folder(root, step).with_suffix(".fetched")
            folder.mkdir(parents=True, exist_ok=True)
            there = self._object(folder.stem, MANIFEST)
            self._store.download_object(there, str(folder / MANIFEST), overwrite=True)
            try:
                checkpoint = Checkpoint(folder, parse(folder))
                missing = checkpoint.metadata["files"].keys() - self._names(folder.stem)
                if missing:
                    raise ValueError(f"{folder}: not a whole checkpoint ({min(missing)} is missing there)")
            except ValueError as error:
                on_skip(f"passed over {error}")
            else:
                yield checkpoint

    def steps(self) -> list[int]:
        """The steps of the committed ones, newest first."""
        start = self._object("", "")
        found = [name.removeprefix(f"{start}/").split("/") for name in self._list(start)]
        committed = {step_of("/".join(parent)) for *parent, name in found if name == MANIFEST}
        return sorted((step for step in committed if step is not None), reverse=True)

    def fetch(self, checkpoint: Checkpoint, name: str) -> None:
        """Bring a file of what ``whole`` found, unless it is there; ranks on one host share it.

        Raises:
            ValueError: it is not what was written.
        """
        path, facts = checkpoint.folder / name, checkpoint.metadata["files"][name]
        if _is_there(path, facts):
            return
        with FileLock(f"{path}.lock"):
            if _is_there(path, facts):
                return
            partial = Path(f"{path}.partial")
            _again(
                self._store.download_object,
                self._object(path.parent.stem, name),
                str(partial),
                overwrite=True,
            )
            if not _is_there(partial, facts):
                size, wanted = partial.stat().st_size, size_of(facts)
                raise ValueError(f"{path}: has {size:,} bytes there, not {wanted:,} as written")
            if isinstance(facts, dict) and fingerprint(partial) != facts:
                raise ValueError(f"{path}: is damaged there: its content is not what was written")
            partial.replace(path)

    def prune(self, step: int, keep: int, milestone: Callable[[int], int]) -> None:
        """Delete what ``prunable`` names of the checkpoints up to that of ``step``, which is there whole.

        And what is left of older ones that never got a manifest. A manifest goes first, so that what an
        interruption leaves does not count.
        """
        committed = [each for each in self.steps() if each <= step]
        names = {name.split("/")[0] for name in self._names("")}
        torn = {each for each in map(step_of, names) if each is not None and each < step} - {*committed}
        for old in [*prunable(committed, keep, milestone), *torn]:
            folder = step_folder(Path(), old).name
            for name in sorted(self._names(folder), key=lambda name: name != MANIFEST):
                self._delete(self._object(folder, name))

    def _delete(self, name: str) -> None:
        store: Any = self._store  # an S3 one of Composer's, whose stores delete nothing themselves
        store.client.delete_object(Bucket=store.bucket, Key=store.get_key(name))

    def _names(self, step: str) -> set[str]:
        """The files of a checkpoint."""
        start = self._object(step, "")
        return {name.removeprefix(f"{start}/") for name in self._list(start)}

    def _list(self, start: str) -> list[str]:
        return self._store.list_objects(f"{start}/" if start else "")

    def _object(self, step: str, name: str) -> str:
        return "/".join(part for part in (self._prefix, step, name) if part)


def _is_there(path: Path, facts: Any) -> bool:
    return path.exists() and path.stat().st_size == size_of(facts)


def _again(action: Callable[..., None], *arguments: Any, **options: Any) -> None:
    """Try until it is done; raises what the last try raised."""
    for seconds in WAITS:
        try:
            return action(*arguments, **options)
        except FileNotFoundError:
            raise
        except Exception:  # every kind of store has its own
            time.sleep(seconds * random.uniform(0.75, 1.25))  # so that ranks do not come back all at once
    return action(*arguments, **options)
