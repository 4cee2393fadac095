"""A checkpoint is a folder; it counts once its manifest is there, which is written last.

ba1000/
    checkpoint.json   the manifest: step, configuration, position in the data, what made it, files with their
                      size and hash
    .metadata         which part of which tensor lies where (torch.distributed.checkpoint)
    __0_0.distcp ...  what each rank wrote
"""

from __future__ import annotations

import errno
import fcntl
import json
import os
import re
import shutil
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO

from dbrx_train.config.inherited import CHECKPOINT_MANIFEST
from dbrx_train.errors import first_line
from dbrx_train.files import fingerprint, naming_file, seal
from dbrx_train.model.hf.files import check_names

__all__ = [
    "MANIFEST",
    "Checkpoint",
    "check_file",
    "check_files",
    "check_listed",
    "commit",
    "fingerprint",
    "finish_commit",
    "hold",
    "hold_newest",
    "keep",
    "newest",
    "open_newest",
    "prunable",
    "prune",
    "publish",
    "read",
    "remove",
    "remove_torn",
    "saved",
    "size_of",
    "step_folder",
    "step_of",
    "whole",
]

MANIFEST = CHECKPOINT_MANIFEST
_STEP = re.compile(r"ba(\d+)")
_THREADS = 8
"""Files hashed at a time: a thread hashes some 8 GB/s, and disks want several readers."""


@dataclass(frozen=True)
class Checkpoint:
    """A whole checkpoint."""

    folder: Path
    metadata: dict[str, Any]
    """What its manifest says: plain values."""

    @property
    def config(self) -> dict[str, Any]:
        """The resolved configuration of the run that saved it."""
        config: dict[str, Any] = self.metadata["config"]
        return config

    @property
    def bytes(self) -> int:
        """Size of its files."""
        return sum(map(size_of, self.metadata["files"].values()))

    @property
    def step(self) -> int:
        return int(self.metadata["time"]["batch"])

    @property
    def tokens(self) -> int:
        """Tokens that the run had seen."""
        return int(self.metadata["time"]["token"])


def step_folder(root: Path, step: int) -> Path:
    return root / f"ba{step}"


def step_of(name: str) -> int | None:
    """The step of a checkpoint by its folder's name; None for any other name."""
    found = _STEP.fullmatch(name)
    return int(found[1]) if found else None


def saved(root: Path) -> list[Path]:
    """The committed checkpoints in ``root``, newest first."""
    manifests = [(step_of(path.parent.name), path.parent) for path in root.glob(f"*/{MANIFEST}")]
    steps = [(step, path) for step, path in manifests if step is not None]
    return [path for _, path in sorted(steps, reverse=True)]


def whole(root: Path, on_skip: Callable[[str], None]) -> Iterator[Checkpoint]:
    """The checkpoints in ``root`` that are whole, newest first; ``on_skip`` hears of the others."""
    for path in saved(root):
        try:
            checkpoint = read(path)
        except ValueError as error:
            if (path / MANIFEST).exists():  # else it was pruned meanwhile, its manifest first
                on_skip(f"passed over {error}")
        else:
            yield checkpoint


def newest(root: Path, on_skip: Callable[[str], None]) -> Checkpoint | None:
    """The first of ``whole``."""
    return next(whole(root, on_skip), None)


def open_newest(path: Path, on_skip: Callable[[str], None]) -> Checkpoint | None:
    """The checkpoint in a folder (ValueError if it is torn), or the newest whole one of the run in it."""
    if (path / MANIFEST).exists():
        return read(path)
    return newest(path, on_skip) or newest(path / "checkpoints", on_skip)


def read(path: Path) -> Checkpoint:
    """The checkpoint in a folder.

    Raises:
        ValueError: it is none, or not whole: a file is missing or has another size than was written.
    """
    checkpoint = Checkpoint(path, parse(path))
    for name, facts in checkpoint.metadata["files"].items():
        file, size = path / name, size_of(facts)
        if not file.exists():
            raise ValueError(f"{path}: not a whole checkpoint ({name} is missing)")
        if file.stat().st_size != size:
            raise ValueError(
                f"{path}: not a whole checkpoint ({name} has {file.stat().st_size:,} bytes, not {size:,})"
            )
    return checkpoint


def parse(path: Path) -> dict[str, Any]:
    """What the manifest in a folder says; raises ValueError if it cannot be read."""
    try:
        facts = json.loads((path / MANIFEST).read_text(encoding="utf-8"))
        if not {"config", "data", "files", "time"} <= facts.keys():
            raise ValueError("lacks entries")
        facts = unsealed(facts)
        check_listed(path / MANIFEST, facts["files"])
        return facts
    except (OSError, ValueError, TypeError, AttributeError) as error:
        raise ValueError(f"{path}: not a whole checkpoint ({MANIFEST}: {first_line(error)})") from None


def sealed(facts: dict[str, Any]) -> dict[str, Any]:
    """Facts with a hash of themselves."""
    return facts | {"seal": seal(json.loads(json.dumps(facts)))}


def unsealed(facts: dict[str, Any]) -> dict[str, Any]:
    """The facts in what ``sealed`` made; raises ValueError if they are not. Older ones have no seal."""
    plain = {key: value for key, value in facts.items() if key != "seal"}
    if facts.get("seal") not in (None, sealed(plain)["seal"]):
        raise ValueError("is damaged: its content is not what was written")
    return plain


def check_listed(listing: Path, files: Any) -> None:
    """Hold what a manifest says of files against its form; raises ValueError."""
    if not isinstance(files, dict):
        raise ValueError(f"{listing}: files: {files!r} is no JSON object")
    check_names(listing, files)
    for name, facts in files.items():
        hashed = isinstance(facts, dict) and facts.keys() == {"bytes", "xxh3"}
        if type(facts["bytes"] if hashed else facts) is not int:
            raise ValueError(f"{listing}: files.{name}: {facts!r} is not a size, nor a size and a hash")


def size_of(facts: Any) -> int:
    """The size in a manifest's entry of a file; older manifests say nothing else."""
    return int(facts["bytes"] if isinstance(facts, dict) else facts)


def check_files(
    checkpoint: Checkpoint, names: Iterable[str], before: Callable[[str], None] = lambda name: None
) -> None:
    """Hold the content of some files of a checkpoint against its manifest, several at a time.

    ``before`` is asked for each file first.

    Raises:
        ValueError: one is missing or damaged; the first in the order of names.
    """

    def check(name: str) -> None:
        before(name)
        check_file(checkpoint.folder / name, checkpoint.metadata["files"][name])

    with ThreadPoolExecutor(min(_THREADS, os.cpu_count() or 1)) as pool:
        for _ in pool.map(check, names):  # raises what a file raised
            pass


def check_file(file: Path, facts: Any) -> None:
    """Hold a file against a manifest's entry.

    Raises:
        ValueError: it is missing, or has another size or content.
    """
    if not file.is_file():
        raise ValueError(f"{file}: is missing")
    if file.stat().st_size != size_of(facts):
        raise ValueError(f"{file}: has {file.stat().st_size:,} bytes, not {size_of(facts):,} as written")
    if isinstance(facts, dict) and fingerprint(file) != facts:
        raise ValueError(f"{file}: is damaged: its content is not what was written")


def commit(folder: Path, facts: dict[str, Any]) -> None:
    """Make the files in ``folder`` a checkpoint, at once and for good."""
    unfinished = folder / f"{MANIFEST}.partial"
    with naming_file(unfinished), unfinished.open("w", encoding="utf-8") as file:
        json.dump(sealed(facts), file, indent=1)
        file.flush()
        os.fsync(file.fileno())
    unfinished.replace(folder / MANIFEST)
    sync_folder(folder)


def sync_folder(folder: Path) -> None:
    """Wait until the names in a folder are on the disk."""
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def publish(partial: Path) -> Path:
    """Give a committed ``ba4.partial`` its name; one that had it before, of a run that was set back, goes."""
    path = partial.with_suffix("")
    if path.exists():
        remove(path)
    partial.rename(path)
    sync_folder(path.parent)
    return path


def finish_commit(root: Path) -> None:
    """Finish what a kill interrupted between a checkpoint's manifest and its name."""
    for partial in root.glob(f"ba*.partial/{MANIFEST}"):
        if step_of(partial.parent.stem) is not None and _is_whole(partial.parent):
            publish(partial.parent)


def _is_whole(path: Path) -> bool:
    try:
        read(path)
    except ValueError:
        return False
    return True


def prunable(steps: Sequence[int], keep: int, milestone: Callable[[int], int] = lambda step: 0) -> list[int]:
    """The steps of checkpoints that may go: neither one of the ``keep`` newest nor a milestone.

    ``milestone``: how many milestones a step lies beyond; the first checkpoint beyond each is kept for good.
    """
    kept, beyond = set(sorted(steps)[-keep:]), 0
    for step in sorted(steps):
        if milestone(step) > beyond:
            beyond = milestone(step)
            kept.add(step)
    return [step for step in steps if step not in kept]


def remove(folder: Path) -> None:
    """Delete a checkpoint; if that is interrupted, what is left no longer counts as one."""
    (folder / MANIFEST).unlink(missing_ok=True)
    shutil.rmtree(folder)


def keep(folder: Path) -> None:
    """Have no run ever prune a checkpoint: a mark beside it says so."""
    _kept(folder).touch()


def _kept(folder: Path) -> Path:
    return folder.with_name(f"{folder.name}.registered")


def prune(folder: Path) -> None:
    """``remove``, unless it is kept for good, or any process holds it: then a later call will."""
    if _kept(folder).exists():
        return
    # Over NFS, whose locks are those of fcntl, one that is to be alone needs a file open for writing.
    with suppress(FileNotFoundError), (folder / MANIFEST).open("r+b") as manifest:
        if _locked(manifest, fcntl.LOCK_EX):
            remove(folder)


def hold(folder: Path) -> BinaryIO | None:
    """Keep a checkpoint from ``prune`` until the result is closed or forgotten; None if it is gone.

    Where the file system knows no locks, it is not kept.
    """
    try:
        manifest = (folder / MANIFEST).open("rb")
    except FileNotFoundError:
        return None
    if _locked(manifest, fcntl.LOCK_SH) and (folder / MANIFEST).exists():
        return manifest
    manifest.close()
    return None


def hold_newest(path: Path, on_skip: Callable[[str], None]) -> tuple[Checkpoint, BinaryIO] | None:
    """What ``open_newest`` finds, held (see ``hold``); None if there is nothing."""
    while (found := open_newest(path, on_skip)) is not None:
        if (manifest := hold(found.folder)) is not None:
            return found, manifest
        if found.folder == path:
            raise ValueError(f"{path}: was pruned by its run; name the run's folder for the newest")
    return None


def _locked(file: BinaryIO, kind: int) -> bool:
    try:
        fcntl.flock(file, kind | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    except OSError as error:
        if error.errno not in (errno.ENOSYS, errno.EOPNOTSUPP, errno.ENOLCK):
            raise
    return True


def remove_torn(root: Path) -> None:
    """Delete what is left of saves that were interrupted, and of what was fetched from elsewhere."""
    for folder in root.glob("ba*"):
        whole = step_of(folder.name) is not None and (folder / MANIFEST).exists()
        if step_of(folder.stem) is not None and folder.is_dir() and not whole:
            shutil.rmtree(folder, ignore_errors=True)  # other hosts may be at it too
