"""Saves the run so that a kill at any moment loses nothing already saved."""

from __future__ import annotations

import errno
import os
import shutil
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
        interval: batches between saves; the end of the run is saved too.
        keep: how many stay, newest first.
        config: kept inside each checkpoint, so that one file is enough to rebuild the model.
    """

    def __init__(self, folder: Path, interval: int, keep: int, config: dict[str, Any]) -> None:
        self.folder = folder
        self.due = create_interval_scheduler(f"{interval}ba")
        self.keep = keep
        self.config = config

    def state_dict(self) -> dict[str, Any]:
        return {"config": self.config}

    def batch_checkpoint(self, state: State, logger: Logger) -> None:
        if self.due(state, Event.BATCH_CHECKPOINT):
            self.save(state)

    def save(self, state: State) -> Path:
        path = self.folder / f"ba{state.timestamp.batch.value}.pt"
        partial = path.with_suffix(".partial")
        try:
            save_checkpoint(state, str(partial))
        except RuntimeError as error:
            partial.unlink(missing_ok=True)
            if shutil.disk_usage(self.folder).free < 2**20 or "file write failed" in str(error):
                raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), str(path)) from error
            raise
        if dist.get_global_rank() == 0:
            with open(partial, "rb") as file:
                os.fsync(file.fileno())
            partial.replace(path)
            for old in saved(self.folder)[self.keep :]:
                old.unlink()
        dist.barrier()
        return path
