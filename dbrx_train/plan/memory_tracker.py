"""Memory and traffic of a rank, observed while its operators run: bytes by kind, at the peak of each moment.

Every operator passes through ``MemoryTracker``, which sees what it allocates; a weak reference to each
storage says when it is released. FSDP takes and frees gathered parameters by resizing their storages.
"""

from __future__ import annotations

import weakref
from collections import Counter
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed.tensor import DTensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from torch.utils.weak import WeakIdKeyDictionary

from dbrx_train.model.moe import grouped_glu
from dbrx_train.plan.caching_allocator import CachingAllocator, rounded

__all__ = ["Collectives", "MemoryTracker", "Peak"]


_DEVICE = torch.ops.prim.device.default


@dataclass
class Peak:
    """Most bytes that were allocated at once during a moment, and of what kinds they were."""

    allocated: int = 0
    by_kind: dict[str, int] = field(default_factory=dict)


@dataclass
class Collectives:
    """Bytes that a rank sends, by the usual ring algorithms (see ``estimates.py``)."""

    gathered: int = 0
    scattered: int = 0
    reduced: int = 0
    exchanged: int = 0


@dataclass(eq=False)
class _Storage:
    """What is known of a storage: its kind, its bytes, and its name in the allocators."""

    kind: str
    size: int
    key: int
    stream: int


class _ShapesOnly:
    """Products of experts that are not computed; the shapes of ``grouped_glu``'s results and temporaries."""

    def __init__(self, num_experts: int) -> None:
        self.num_experts = num_experts

    def rows(self, a: Tensor, b: Tensor, transposed: bool) -> Tensor:
        return a.new_empty(a.shape[0], b.shape[1 if transposed else 2])

    def matrices(self, a: Tensor, b: Tensor) -> Tensor:
        return a.new_empty(self.num_experts, a.shape[1], b.shape[1])


class MemoryTracker(TorchDispatchMode):
    """Observes operators on fakes; its ``moment`` and the kind of new tensors are its user's to set."""

    def __init__(self) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.moment, self.default_kind = "", "activations"
        self.collectives = Collectives()
        self.allocators = {
            "segments": CachingAllocator(expandable=False),
            "expandable": CachingAllocator(expandable=True),
        }
        self.peaks: dict[str, Peak] = {}
        self._now: Counter[str] = Counter()
        self._total = self._keys = 0
        self._storages: Any = WeakIdKeyDictionary()  # type: ignore[no-untyped-call]
        self._dispatched: dict[Any, Callable[..., Any]] = {
            torch.ops.dbrx_train.grouped_glu.default: _glu_forward,
            torch.ops.dbrx_train.grouped_glu_backward.default: _glu_backward,
        }

    def begin(self) -> None:
        """Forget peaks and bytes sent so far."""
        self.peaks, self.collectives = {}, Collectives()

    def tag(self, tensors: Iterable[Tensor], kind: str) -> None:
        """Say of what kind tensors are."""
        for tensor in tensors:
            self._see(tensor, kind, final=True)

    @contextmanager
    def resizing(self) -> Iterator[None]:
        """Observes storages that are resized, which no operator tells of."""
        resize = torch.UntypedStorage.resize_

        def observed(storage: torch.UntypedStorage, size: int) -> None:
            resize(storage, size)
            if (known := self._storages.get(storage)) is not None:
                self._resized(known, rounded(storage.nbytes()))

        torch.UntypedStorage.resize_ = observed  # type: ignore[method-assign,assignment]
        try:
            yield
        finally:
            torch.UntypedStorage.resize_ = resize  # type: ignore[method-assign]

    @contextmanager
    def scalars(self, value: float) -> Iterator[None]:
        """Fake scalars, which have none, are read as ``value``."""
        self._dispatched[torch.ops.aten._local_scalar_dense.default] = lambda scalar: value
        try:
            yield
        finally:
            del self._dispatched[torch.ops.aten._local_scalar_dense.default]

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if func is _DEVICE and hasattr(args[0], "fake_device"):  # half of all calls
            return args[0].fake_device
        if (shown := self._dispatched.get(func)) is not None:
            with self:  # so that what it allocates in between is seen too
                return shown(*args, **kwargs)
        out = func(*args, **kwargs)
        name = func._overloadpacket.__name__
        if func.namespace == "c10d":
            self._collective(name, args)
        elif name == "split_with_sizes_copy" and func.namespace == "fsdp":
            self.tag(kwargs["out"], "gathered")
        elif name == "all_gather_copy_in":
            self.tag(out, "gather buffers")
        else:
            for leaf in tree_leaves(out):
                if isinstance(leaf, Tensor):
                    self._see(leaf, self.default_kind)
        return out

    def _collective(self, name: str, args: Any) -> None:
        sent = self.collectives
        if name == "_allgather_base_":
            sent.gathered += _ring(args[0], args[2])
        elif name == "_reduce_scatter_base_":
            sent.scattered += _ring(args[1], args[2])
            self.tag([args[1]], "scattered")
            self.tag([args[0]], "gradients")
        elif name == "allreduce_":
            # Of integers are counts of tokens, which no traffic is counted for.
            if args[0][0].is_floating_point():
                sent.reduced += 2 * _ring(args[0][0], args[1])
        elif name == "alltoall_base_":
            out, rows, group, _, splits = args[:5]
            ranks, me = dist.ProcessGroup.unbox(group).size(), dist.ProcessGroup.unbox(group).rank()
            splits = splits or [rows.shape[0] // ranks] * ranks
            sent.exchanged += (sum(splits) - splits[me]) * (rows[0].nbytes if rows.shape[0] else 0)
            self.tag([out], "exchanged")

    def _see(self, tensor: Tensor, kind: str, final: bool = False) -> None:
        local = tensor._local_tensor if isinstance(tensor, DTensor) else tensor
        storage = local.untyped_storage()
        known = self._storages.get(storage)
        if known is None:
            # FSDP on a CPU asks for streams as on a GPU, though they do nothing there.
            known = _Storage(kind, 0, 0, id(torch.cpu.current_stream()))
            self._storages[storage] = known
            weakref.finalize(storage, self._resized, known, 0)
        elif final and known.kind != kind:
            self._now[known.kind] -= known.size
            self._now[kind] += known.size
            known.kind = kind
        self._resized(known, rounded(storage.nbytes()))

    def _resized(self, known: _Storage, size: int) -> None:
        if size == known.size:
            return
        for allocator in self.allocators.values():
            if known.size:
                allocator.release(known.key)
            if size:
                allocator.allocate(self._keys, size, known.stream)
        known.key, self._keys = self._keys, self._keys + 1
        self._now[known.kind] += size - known.size
        self._total += size - known.size
        known.size = size
        peak = self.peaks.setdefault(self.moment, Peak())
        if self._total > peak.allocated:
            self.peaks[self.moment] = Peak(self._total, dict(self._now))


def _ring(whole: Tensor, group: Any) -> int:
    ranks = dist.ProcessGroup.unbox(group).size()
    return whole.nbytes * (ranks - 1) // ranks


def _glu_forward(
    x: Tensor, weight: Tensor | None, w1: Tensor, v1: Tensor, w2: Tensor,
    counts: Tensor, impl: str, answers: bool,
) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
    return grouped_glu.forward_at_once(_ShapesOnly(w1.shape[0]), x, weight, w1, v1, w2, answers)


def _glu_backward(
    dy: Tensor, x: Tensor, gate: Tensor, up: Tensor, weight: Tensor | None,
    w1: Tensor, v1: Tensor, w2: Tensor, counts: Tensor, impl: str, trains: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:  # fmt: skip
    return grouped_glu.backward_at_once(_ShapesOnly(w1.shape[0]), dy, x, gate, up, weight, w1, v1, w2, trains)
