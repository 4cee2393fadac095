"""Saves the run so that a kill at any moment loses nothing already saved."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

from composer import Callback, Event, Logger, State
from composer.utils import dist
from composer.utils.checkpoint import save_checkpoint
from composer.utils.misc import create_interval_scheduler

from dbrx_train.checkpoint.files import saved


class Checkpoints(Callback):  # type: ignore[misc]
    """Writes ``ba{batch}.pt`` under another name first and renames it when it is whole.

    Args:
        folder: where to; made if need be.
        interval: between saves, a Composer time string; the end of the run is saved too.
        keep: how many stay, the newest.
        config: kept inside each checkpoint, so that one file is enough to rebuild the model.
    """

    def __init__(self, folder: Path, interval: str, keep: int, config: dict[str, Any]) -> None:
        self.folder = folder
        self.due = create_interval_scheduler(interval)
        self.keep = keep
        self.config = config

    def state_dict(self) -> dict[str, Any]:
        return {"config": self.config}

    def fit_start(self, state: State, logger: Logger) -> None:
        if dist.get_global_rank() == 0:
            for torn in self.folder.glob("ba*.partial"):
                torn.unlink()

    def batch_checkpoint(self, state: State, logger: Logger) -> None:
        if self.due(state, Event.BATCH_CHECKPOINT):
            self.save(state)

    def save(self, state: State) -> None:
        path = self.folder / f"ba{state.timestamp.batch.value}.pt"
        partial = path.with_suffix(".partial")
        try:
            save_checkpoint(state, str(partial))
            if dist.get_global_rank() == 0:
                with open(partial, "rb") as file:
                    os.fsync(file.fileno())
                partial.replace(path)
        except (RuntimeError, OSError) as error:
            partial.unlink(missing_ok=True)
            cause = _disk_error(error)
            if cause is None:
                raise
            raise OSError(cause.errno, cause.strerror, str(path)) from error
        if dist.get_global_rank() == 0:
            self._prune(path)
        dist.barrier()

    def _prune(self, path: Path) -> None:
        # Files that claim to be newer are damaged ones, passed over on resuming: they do not count as kept.
        found = saved(self.folder)
        for old in found[found.index(path) + self.keep :]:
            old.unlink()


def _disk_error(error: BaseException | None) -> OSError | None:
    """The OSError behind torch's report of a failed write, which names no cause itself."""
    while error is not None:
        if isinstance(error, OSError) and error.errno is not None:
            return error
        error = error.__cause__ or error.__context__
    return None
