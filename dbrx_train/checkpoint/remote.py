"""Checkpoints on an object store, beside the local ones."""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path
from typing import Protocol

from filelock import FileLock

from dbrx_train.checkpoint.folder import MARK, Checkpoint, parse, step_folder, step_of

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

    def newest(self, root: Path) -> Checkpoint | None:
        """The newest marked one, as a folder in ``root`` that holds no tensors yet: ``fetch`` brings them."""
        marks = [
            name.split("/") for name in self._store.list_objects(f"{self._prefix}/") if name.endswith(MARK)
        ]
        steps = [step for *_, parent, _ in marks if (step := step_of(parent)) is not None]
        if not steps:
            return None
        folder = step_folder(root, max(steps)).with_suffix(".fetched")
        folder.mkdir(parents=True, exist_ok=True)
        self._store.download_object(self._object(folder.stem, MARK), str(folder / MARK), overwrite=True)
        return Checkpoint(folder, parse(folder))

    def fetch(self, folder: Path, name: str) -> None:
        """Bring a file of what ``newest`` found, unless it is there; ranks on one host share it."""
        path = folder / name
        with FileLock(f"{path}.lock"):
            if not path.exists():
                partial = f"{path}.partial"
                self._store.download_object(self._object(folder.stem, name), partial, overwrite=True)
                Path(partial).replace(path)

    def _object(self, step: str, name: str) -> str:
        return "/".join(part for part in (self._prefix, step, name) if part)
