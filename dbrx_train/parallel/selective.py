"""Selective activation recomputation: results of the named operators are kept, all else is computed again.

As torch's ``create_selective_checkpoint_contexts``, but for operators alone that are to be kept: that of
torch 2.14 refuses a repetition which does anything that the forward pass did not, and FSDP's hooks inside of
a block gather, and tell the profiler, different things in the two.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Set as AbstractSet
from typing import Any

from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_map_only

__all__ = ["keep_results"]


def keep_results(of: AbstractSet[Any]) -> tuple[TorchDispatchMode, TorchDispatchMode]:
    """Contexts of a forward pass, and of its one repetition.

    The first keeps the results of the operators ``of``, the second takes them in turn and computes them not.
    """
    results: deque[Any] = deque()
    return _Keep(of, results), _Take(of, results)


class _Keep(TorchDispatchMode):
    def __init__(self, of: AbstractSet[Any], results: deque[Any]) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.of, self.results = of, results

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        if func in self.of:
            # Another object than the one that autograd is going to hang the graph on, which would keep itself
            self.results.append(tree_map_only(Tensor, Tensor.detach, result))
        return result


class _Take(_Keep):
    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        return self.results.popleft() if func in self.of else func(*args, **(kwargs or {}))
