"""Which checkpoint a run goes on from: the newest that verifies, the same on every rank.

Ranks share the reading, so that each byte is hashed once: a rank takes the files that it wrote, if there are
as many ranks as then, and finds them in the page cache when it loads them.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator

import torch.distributed as dist

from dbrx_train.checkpoint.folder import Checkpoint, check_files
from dbrx_train.parallel.gather import gather_objects

__all__ = ["select"]

_WRITTEN_BY = re.compile(r"__(\d+)_")


def select(
    candidates: Iterator[Checkpoint],
    fetch: Callable[[Checkpoint, str], None],
    on_skip: Callable[[str], None],
    readers: int | None = None,
) -> Checkpoint | None:
    """The first of rank 0's ``candidates`` whose files hold what its manifest says; all ranks call this.

    ``fetch`` brings a file to this host, if it is not there. ``on_skip`` hears of those that are damaged.
    ``readers``: how many ranks read, the first ones; by default all.

    Raises:
        ValueError: what looking for a candidate raised on rank 0.
    """
    while True:
        found = _next(candidates)
        if found is None:
            return None
        trouble = next(filter(None, gather_objects(_damage(found, fetch, readers))), None)
        if trouble is None:
            return found
        on_skip(f"passed over {trouble}")


def _damage(
    checkpoint: Checkpoint, fetch: Callable[[Checkpoint, str], None], readers: int | None
) -> str | None:
    """What is wrong with this rank's share of the files."""
    rank, ranks = _place()
    mine = [name for name in checkpoint.metadata["files"] if _writer(name) % (readers or ranks) == rank]
    try:
        check_files(checkpoint, mine, lambda name: fetch(checkpoint, name))
    except ValueError as error:
        return str(error)
    return None


def _writer(name: str) -> int:
    found = _WRITTEN_BY.match(name)
    return int(found[1]) if found else 0


def _place() -> tuple[int, int]:
    return (dist.get_rank(), dist.get_world_size()) if dist.is_initialized() else (0, 1)


def _next(candidates: Iterator[Checkpoint]) -> Checkpoint | None:
    found: list[Checkpoint | ValueError | None] = [None]
    rank, ranks = _place()
    if rank == 0:
        try:
            found = [next(candidates, None)]
        except ValueError as error:
            found = [error]
    if ranks > 1:
        dist.broadcast_object_list(found)
    if isinstance(found[0], ValueError):
        raise found[0]
    return found[0]
