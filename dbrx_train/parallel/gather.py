"""What every rank has to say, on all of them."""

from __future__ import annotations

from typing import TypeVar

import torch.distributed as dist

__all__ = ["gather_objects"]

_T = TypeVar("_T")


def gather_objects(mine: _T, group: dist.ProcessGroup | None = None) -> list[_T]:
    """Each rank's object, in the order of ranks, once all have called this; alone, one's own.

    ``group``: of all ranks that call; None for the default one, or no other process at all.
    """
    if not dist.is_initialized() or dist.get_world_size(group) == 1:
        return [mine]
    said = [mine] * dist.get_world_size(group)
    dist.all_gather_object(said, mine, group)
    return said
