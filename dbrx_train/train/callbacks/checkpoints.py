"""Saves the run so that a kill at any moment loses nothing already saved."""

from __future__ import annotations

import shutil
import time
import uuid
import warnings
from collections.abc import Callable, Iterable, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from datetime import timedelta
from functools import partial as bind
from pathlib import Path
from typing import Any

import torch
from composer import Callback, Event, Logger, State, Timestamp
from composer.utils import dist
from composer.utils.misc import create_interval_scheduler
from torch import Tensor
from torch.distributed import ProcessGroup, new_group

from dbrx_train.checkpoint import folder as folders
from dbrx_train.checkpoint.remote import Remote
from dbrx_train.checkpoint.remote_lease import RemoteLease
from dbrx_train.checkpoint.tensors import Staging, own_share, write
from dbrx_train.errors import first_line
from dbrx_train.lease import Lease
from dbrx_train.parallel.gather import gather_objects
from dbrx_train.train.exports import Exports
from dbrx_train.train.train_state import metadata, tensors


class Checkpoints(Callback):  # type: ignore[misc]
    """Writes every rank's part to a folder ``ba{batch}.partial``, which is renamed when it is whole.

    Args:
        root: where to; made if need be.
        interval: between saves, a Composer time string; the end of the run is saved too.
        keep: how many stay in ``root``, the newest.
        provenance: kept inside each checkpoint; its ``config`` is enough to rebuild the model.
        milestone: how many milestones a step lies beyond; the first checkpoint beyond each stays too.
        asynchronous: go on training while a copy in the host's memory is written.
        remote: where every checkpoint is copied to as well.
        prune_remote: keep there what stays in ``root``; else nothing is deleted there.
        timeout: seconds after which ranks give up waiting for each other.
        exports: which checkpoints to write in Hugging Face's form too; they are saved for it.
        leases: of what another process might take over.
    """

    def __init__(
        self,
        root: Path,
        interval: str,
        keep: int,
        provenance: dict[str, Any],
        *,
        milestone: Callable[[int], int] = lambda step: 0,
        asynchronous: bool = False,
        remote: Remote | None = None,
        prune_remote: bool = False,
        timeout: float = 1800.0,
        exports: Exports | None = None,
        leases: Sequence[Lease | RemoteLease] = (),
    ) -> None:
        self.root, self.keep, self.milestone, self.provenance = root, keep, milestone, provenance
        self.remote, self.prune_remote = remote, prune_remote
        self.not_copied = 0
        """Checkpoints that ``remote`` did not take."""
        self.leases = leases
        self.exports, self.timeout = exports, timedelta(seconds=timeout)
        self.due = create_interval_scheduler(interval)
        self.writer = ThreadPoolExecutor(1, "checkpoints", _same_device()) if asynchronous else None
        self.staging = Staging()
        self.pending: Future[None] | None = None
        self.group: ProcessGroup | None = None
        self.saved: Timestamp | None = None
        """Of the state that was saved last."""
        self.shared = True
        """All hosts see the same ``root``."""

    def fit_start(self, state: State, logger: Logger) -> None:
        warnings.filterwarnings("ignore", "TypedStorage is deprecated")  # torch's own use of it in saving
        if dist.get_world_size() > 1 and self.group is None:
            # Apart from training's, for a thread may use it
            self.group = new_group(backend="gloo", timeout=self.timeout)
        self.shared = self._is_shared()
        if not self.shared and self.remote is None:
            raise ValueError(
                f"folder: {self.root} is not the same on all hosts; must be one that they share, unless "
                f"checkpoints.remote is set"
            )
        self._gather(None)  # other ranks have read what they go on from
        if dist.get_local_rank() == 0:
            folders.remove_torn(self.root)
        self._gather(None)  # and none has begun to save

    def _is_shared(self) -> bool:
        """Whether every rank sees what rank 0 puts into ``root``."""
        first = dist.get_global_rank() == 0
        probe = self.root / f".probe-{uuid.uuid4().hex}"  # a name that no host has asked for before
        if first:
            self.root.mkdir(parents=True, exist_ok=True)
            for left in self.root.glob(".probe-*"):  # by a run that was killed
                left.unlink()
            probe.touch()
        name = self._gather(probe.name if first else None)[0]
        assert name is not None
        seen = self._gather("yes" if (self.root / name).exists() else None)
        if first:
            probe.unlink()
        return all(seen)

    def batch_checkpoint(self, state: State, logger: Logger) -> None:
        if self.pending is not None and self.pending.done():
            self.wait()
        exported = self.exports is not None and self.exports.due(state, Event.BATCH_CHECKPOINT)
        if self.due(state, Event.BATCH_CHECKPOINT) or exported:
            begin = time.monotonic()
            self.save(state, exported)
            logger.log_metrics({"checkpoints/stall_seconds": time.monotonic() - begin})
            if self.remote is not None:
                logger.log_metrics({"checkpoints/not_copied": self.not_copied})

    def fit_end(self, state: State, logger: Logger) -> None:
        self.wait()
        if self.exports is None:
            return
        # Rank 0 exports, for longer than ranks may wait for each other at one time.
        while self._gather("busy" if self.exports.reading else None)[0]:
            time.sleep(0.5)
        self.exports.wait()

    def close(self, state: State, logger: Logger) -> None:
        self.finish()
        if self.exports is not None:
            self.exports.close()
        if self.writer is not None:
            self.writer.shutdown()

    def finish(self) -> None:
        """Until what is being written is whole, or has failed; for a run that ends early."""
        try:
            self.wait()
        except Exception as error:  # the run ends for another reason
            warnings.warn(f"the last checkpoint is lost ({first_line(error)})", stacklevel=1)

    def wait(self) -> None:
        """Until what is being written is whole; raises what went wrong."""
        if self.pending is not None:
            pending, self.pending = self.pending, None
            pending.result()

    def save_now(self, state: State) -> None:
        """Save this step, unless it has been; returns when it is whole."""
        if self.saved is not state.timestamp:
            self.save(state)
        self.wait()

    def save(self, state: State, exported: bool = False) -> None:
        self.wait()
        self.saved = state.timestamp
        facts = metadata(state) | self.provenance
        partial = folders.step_folder(self.root, state.timestamp.batch.value).with_suffix(".partial")
        content = own_share(tensors(state))
        if self.writer is None:
            self._write(partial, content, facts, exported)
        else:
            copies = self.staging.copy(content)
            self.pending = self.writer.submit(self._write, partial, copies, facts, exported)

    def _write(
        self, partial: Path, content: dict[str, Tensor], facts: dict[str, Any], exported: bool
    ) -> None:
        path = partial.with_suffix("")
        self._check_leases()
        try:
            files = write(partial, content, self.group)
        except OSError as error:
            if dist.get_local_rank() == 0:
                shutil.rmtree(partial, ignore_errors=True)
            raise OSError(error.errno, error.strerror, str(path)) from error
        copied = self._upload(partial, files)
        if dist.get_global_rank() == 0:
            self._keep(partial, facts | {"files": files})
        elif dist.get_local_rank() == 0 and not self.shared:
            shutil.rmtree(partial)  # parts of a checkpoint, which the store has whole
        self._gather(None)
        if copied and dist.get_global_rank() == 0:
            self._finish_copy(path)
        if self.exports is not None and exported and dist.get_global_rank() == 0:
            self.exports.begin(path)

    def _upload(self, partial: Path, names: Iterable[str]) -> bool:
        """Copy this rank's files to the object store; whether all ranks' are there."""
        if self.remote is None:
            return False
        rank = dist.get_global_rank()
        mine = [name for name in names if name.startswith(f"__{rank}_")]
        trouble = self._try(self.remote.withdraw, partial) if rank == 0 else None
        self._gather(None)  # nothing is replaced that still counts
        trouble = trouble or self._try(
            self.remote.upload, partial, [".metadata", *mine] if rank == 0 else mine
        )
        troubles = [f"rank {rank}: {text}" for rank, text in enumerate(self._gather(trouble)) if text]
        if troubles:
            self._warn(partial.with_suffix(""), troubles[0])
        return not troubles

    def _finish_copy(self, path: Path) -> None:
        """Make what was copied a checkpoint there, and prune older ones."""
        assert self.remote is not None
        trouble = self._try(self.remote.upload, path, [folders.MANIFEST])
        if trouble is not None:
            self._warn(path, trouble)
        elif self.prune_remote:
            trouble = self._try(self.remote.prune, folders.step_of(path.name), self.keep, self.milestone)
            if trouble is not None:
                warnings.warn(
                    f"checkpoints.prune_remote: older ones are still there ({trouble})", stacklevel=1
                )

    def _warn(self, path: Path, trouble: str) -> None:
        """Say that a checkpoint is not on the store; training goes on, and the next is copied again."""
        self.not_copied += 1
        if dist.get_global_rank() == 0:
            state = "is whole, but" if self.shared else "is lost:"
            where = "checkpoints.remote, which keeps older ones"
            warnings.warn(f"{path} {state} it cannot be copied to {where} ({trouble})", stacklevel=1)

    def _try(self, action: Callable[..., None], *arguments: Any) -> str | None:
        """Do something with the store; returns what went wrong."""
        try:
            action(*arguments)
        except Exception as error:  # every kind of store has its own
            return first_line(error)
        return None

    def _keep(self, partial: Path, facts: dict[str, Any]) -> None:
        """Make what was written a checkpoint, and prune older ones."""
        self._check_leases()
        folders.commit(partial, facts)
        path = folders.publish(partial)
        # Folders that claim to be newer are damaged ones, passed over on resuming: they do not count as kept.
        found = folders.saved(self.root)
        steps = [folders.step_of(each.name) or 0 for each in found[found.index(path) :]]
        needed = self.exports.reading if self.exports is not None else ()
        for step in folders.prunable(steps, self.keep, self.milestone):
            old = folders.step_folder(self.root, step)
            if old not in needed:
                folders.prune(old)

    def _check_leases(self) -> None:
        for lease in self.leases:
            lease.check()

    def _gather(self, mine: str | None) -> list[str | None]:
        """What each rank says, once all have said it."""
        return gather_objects(mine, self.group)


def _same_device() -> Callable[[], None]:
    """Has another thread use this one's GPU, where it would use the first and open a context there."""
    if not torch.cuda.is_available():
        return lambda: None
    return bind(torch.cuda.set_device, torch.cuda.current_device())
