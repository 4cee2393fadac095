"""A folder that is made in parts and gone on with after any interruption: whose it is, and how far it is.

A hidden sub-folder holds the work: each part leaves a mark there, last. One file, written last of all, makes
the folder whole.
"""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from dbrx_train.errors import aside
from dbrx_train.lease import FOLDER as LEASE
from dbrx_train.lease import Lease

__all__ = ["check_processes", "claimed", "has_marks", "read_mark", "remove_traces"]


def check_processes(processes: int | None) -> None:
    """Raise ValueError for a number of workers that is none."""
    if processes is not None and processes < 1:
        raise ValueError(f"processes: {processes} is too few; give at least 1")


@contextmanager
def claimed(
    folder: Path, work: str, whole: str, doing: str, begin_or_resume: Callable[[], None]
) -> Iterator[Lease]:
    """The folder leased and ready to work in, or finished; refuses one that belongs to something else.

    Args:
        folder: to be made.
        work: the sub-folder of the work.
        whole: the file that is written last.
        doing: what is done, as "preparation".
        begin_or_resume: makes the work ready, or sees that it is of the same plan.

    Raises:
        ValueError: the folder is something else's, or another process is at work there.
    """
    begun = (folder / work).is_dir() or not folder.is_dir() or {*os.listdir(folder)} <= {LEASE}
    if not begun and not (folder / whole).is_file():
        raise ValueError(f"{folder}: is not empty and holds no unfinished {doing}; choose another --out")
    folder.mkdir(parents=True, exist_ok=True)
    with Lease(folder, lost=aside, say=aside) as lease:
        if not (folder / whole).is_file():
            begin_or_resume()
        yield lease


def remove_traces(folder: Path, work: str) -> None:
    """Remove what served the work only. The lease goes only once the folder is whole, to stop a newcomer."""
    for name in (work, LEASE):
        shutil.rmtree(folder / name, ignore_errors=True)


def has_marks(work: Path) -> bool:
    """Whether any part is done."""
    return any(work.glob("part-*.json"))


def read_mark(mark: Path) -> dict[str, Any] | None:
    """What a part that is done gave; None if it is not done."""
    return json.loads(mark.read_text(encoding="utf-8")) if mark.is_file() else None
