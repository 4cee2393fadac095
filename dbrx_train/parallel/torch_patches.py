"""What FSDP2 gets wrong, or has no name for: the one place that reaches into torch.

On CPUs, where gloo carries the bytes, a run would not compute what the same run on GPUs does.
"""

from __future__ import annotations

import functools
import importlib
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import nn

__all__ = ["kept_unsharded", "mend_fsdp_on_cpu"]


@functools.cache
def mend_fsdp_on_cpu() -> None:
    """Mend two faults of torch 2.7. Releases from 2.11 on have been seen to be right and are left alone.

    - gloo returns the sum where the average is asked for, so gradients come out as many times too large as
      there are ranks (an Adam run hides it until gradients are clipped). FSDP2 divides by hand for one type
      of device; its answer is given for the CPU too.
    - With replicas (HSDP) FSDP2 insists on an event of the all-reduce, which a CPU has no stream to record
      and nobody waits for there.
    """
    if tuple(map(int, torch.__version__.split(".")[:2])) >= (2, 11):
        return
    package = "torch.distributed.fsdp._fully_shard"
    collectives: Any = importlib.import_module(f"{package}._fsdp_collectives")
    param_group: Any = importlib.import_module(f"{package}._fsdp_param_group")
    divide_factors, reduce = collectives._get_gradient_divide_factors, param_group.foreach_reduce

    @functools.wraps(divide_factors)
    def by_hand(scatter: Any, replicas: Any, dtype: torch.dtype, device_type: str = "") -> Any:
        return divide_factors(scatter, replicas, dtype, "mtia" if device_type == "cpu" else device_type)

    @functools.wraps(reduce)
    def with_event(*args: Any, **kwargs: Any) -> Any:
        *before, all_reduce_input, event, partial = reduce(*args, **kwargs)
        if all_reduce_input is not None and event is None:
            event = object()
        return (*before, all_reduce_input, event, partial)

    collectives._get_gradient_divide_factors = by_hand
    param_group.foreach_reduce = with_event


@contextmanager
def kept_unsharded(module: nn.Module) -> Iterator[None]:
    """Leave an FSDP unit gathered after its forward pass, for a backward pass that follows at once.

    Of a unit inside a block that is computed again FSDP learns this only after the repetition, so it would
    free the unit and gather it a third time. Anything else is left alone, as is FSDP if it does not keep its
    choice where it does today (torch 2.7 to 2.11).
    """
    state = getattr(module, "_get_fsdp_state", None)
    group: Any = getattr(state() if state else None, "_fsdp_param_group", None)
    if not hasattr(group, "post_forward_mesh_info"):
        yield
        return
    before = group.post_forward_mesh_info
    group.post_forward_mesh_info = None
    try:
        yield
    finally:
        group.post_forward_mesh_info = before
