"""Checkpoints in Hugging Face's form, written while training goes on."""

from __future__ import annotations

import shutil
import warnings
from collections.abc import Set
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path

import torch
from composer.utils import dist
from composer.utils.misc import create_interval_scheduler

from dbrx_train.checkpoint.huggingface import export
from dbrx_train.errors import first_line

__all__ = ["Exports"]


class Exports:
    """Exports checkpoints one after another on a thread of rank 0, from their files, so training only waits
    for the checkpoints themselves.

    Args:
        root: where to; each export is a folder named as its checkpoint.
        interval: between exports, a Composer time string; the end of the run is exported too.
        dtype: of the weights.
    """

    def __init__(self, root: Path, interval: str, dtype: torch.dtype) -> None:
        self.root, self.dtype = root, dtype
        self.due = create_interval_scheduler(interval)
        self._worker = ThreadPoolExecutor(1, "exports")
        self._pending: dict[Path, Future[None]] = {}
        if dist.get_global_rank() == 0:
            for left in root.glob("*.partial"):  # of a run that was killed
                shutil.rmtree(left, ignore_errors=True)

    @property
    def reading(self) -> Set[Path]:
        """Checkpoints that are still needed."""
        self._pending = {path: work for path, work in self._pending.items() if not work.done()}
        return self._pending.keys()

    def begin(self, checkpoint: Path) -> None:
        """Export a checkpoint when those before it are done."""
        self._pending[checkpoint] = self._worker.submit(self._export, checkpoint)

    def wait(self) -> None:
        """Until all are written."""
        for work in self._pending.values():
            work.result()

    def close(self) -> None:
        """Finish what is being written, and nothing after it."""
        self._worker.shutdown(cancel_futures=True)

    def _export(self, checkpoint: Path) -> None:
        out = self.root / checkpoint.name
        new, old = (out.with_name(f"{out.name}.{age}.partial") for age in ("new", "old"))
        try:
            for left in (new, old):
                shutil.rmtree(left, ignore_errors=True)
            export(checkpoint, new, self.dtype, warnings.warn)
            if out.exists():  # of a run that was set back to an earlier checkpoint
                out.rename(old)
            new.rename(out)
            shutil.rmtree(old, ignore_errors=True)
        except Exception as error:  # the checkpoint is there, and can be exported later
            warnings.warn(
                f"checkpoints.export: {out} could not be written ({first_line(error)})", stacklevel=1
            )
