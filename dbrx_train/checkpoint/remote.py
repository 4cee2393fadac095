"""Checkpoints on an object store, beside the local ones."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from math import inf
from pathlib import Path
from typing import Protocol

from filelock import FileLock

from dbrx_train.checkpoint.folder import MARK, Checkpoint, parse, size_of, step_folder, step_of

__all__ = ["ObjectStore", "Remote"]


class ObjectStore(Protocol):
    """What is asked of a store; Composer's are ones."""

    def upload_object(self, object_name: str, filename: str) -> None: ...

    def download_object(self, object_name: str, filename: str, overwrite: bool = False) -> None: ...

    def list_objects(self, prefix: str | None = None) -> list[str]: ...


class Remote:
    """Checkpoints as objects ``prefix/ba1000/FILE``; one counts once its mark is there, as in a folder."""

    def __init__(self, store: ObjectStore, prefix: str) -> None:
        self._store, self._prefix = store, prefix.strip("/")

    def upload(self, folder: Path, names: Iterable[str]) -> None:
        """Copy files of a checkpoint; give its mark last, when all ranks' files are there."""
        for name in names:
            self._store.upload_object(self._object(folder.stem, name), str(folder / name))

    def withdraw(self, folder: Path) -> None:
        """Before a checkpoint is replaced: the mark of the one that is there, if any, no longer counts."""
        if MARK in self._names(folder.stem):
            nothing = folder / f"{MARK}.withdrawn"
            nothing.touch()
            self._store.upload_object(self._object(folder.stem, MARK), str(nothing))
            nothing.unlink()

    def newest(self, root: Path, passed_over: Callable[[str], None], last: float = inf) -> Checkpoint | None:
        """The newest whole one, as a folder in ``root`` that holds no tensors yet: ``fetch`` brings them.

        Of step ``last`` at most. ``passed_over`` hears of newer ones that are not whole.
        """
        start = self._object("", "")
        found = [name.removeprefix(f"{start}/").split("/") for name in self._list(start)]
        marked = {step_of("/".join(parent)) for *parent, name in found if name == MARK}
        for step in sorted((step for step in marked if step is not None and step <= last), reverse=True):
            folder = step_folder(root, step).with_suffix(".fetched")
            folder.mkdir(parents=True, exist_ok=True)
            self._store.download_object(self._object(folder.stem, MARK), str(folder / MARK), overwrite=True)
            try:
                checkpoint = Checkpoint(folder, parse(folder))
                missing = checkpoint.facts["files"].keys() - self._names(folder.stem)
                if not missing:
                    return checkpoint
                raise ValueError(f"{folder}: not a whole checkpoint ({min(missing)} is missing there)")
            except ValueError as error:
                passed_over(f"passed over {error}")
        return None

    def fetch(self, checkpoint: Checkpoint, name: str) -> None:
        """Bring a file of what ``newest`` found, unless it is there; ranks on one host share it.

        Raises:
            ValueError: it has another size than was written.
        """
        path, size = checkpoint.folder / name, size_of(checkpoint.facts["files"][name])
        with FileLock(f"{path}.lock"):
            if path.exists() and path.stat().st_size == size:
                return
            partial = Path(f"{path}.partial")
            self._store.download_object(self._object(path.parent.stem, name), str(partial), overwrite=True)
            if partial.stat().st_size != size:
                raise ValueError(
                    f"{path}: has {partial.stat().st_size:,} bytes there, not {size:,} as written"
                )
            partial.replace(path)

    def _names(self, step: str) -> set[str]:
        """The files of a checkpoint."""
        start = self._object(step, "")
        return {name.removeprefix(f"{start}/") for name in self._list(start)}

    def _list(self, start: str) -> list[str]:
        return self._store.list_objects(f"{start}/" if start else "")

    def _object(self, step: str, name: str) -> str:
        return "/".join(part for part in (self._prefix, step, name) if part)
