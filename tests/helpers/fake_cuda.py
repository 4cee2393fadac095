"""Models on fake CUDA tensors, which have shapes and devices and no contents: no GPU is needed.

torch built for CUDA asks for a driver even then, as soon as there are gradients; ``environment`` provides for
one that computes nothing. ``with fake_cuda():`` in a process that was started with it.
"""

from __future__ import annotations

import os
import shutil
import subprocess
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any
from unittest import mock

import torch
from paths import HELPERS
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from dbrx_train.model.config import DbrxConfig
from dbrx_train.model.decoder import Dbrx
from dbrx_train.model.moe import grouped_glu
from dbrx_train.model.moe.layer import MoE

OPERATORS = torch.ops.dbrx_train


def environment(folder: Path) -> dict[str, str] | None:
    """Variables for a process that is to use fake CUDA tensors; None where none can be made."""
    if torch.version.cuda is None or torch.cuda.is_available():
        return dict(os.environ)
    if shutil.which("gcc") is None:
        return None
    driver = folder / "libcuda.so.1"
    source = str(HELPERS / "fake_driver.c")
    subprocess.run(["gcc", "-shared", "-fPIC", "-w", "-o", str(driver), source], check=True)
    return {**os.environ, "LD_PRELOAD": str(driver), "LD_LIBRARY_PATH": str(folder)}


@contextmanager
def fake_cuda() -> Iterator[None]:
    """Tensors made in the body are fake, and ``cuda`` is a device that they may be on."""
    with (
        mock.patch("torch.cuda.is_available", return_value=False),  # else the device would be initialised
        mock.patch("torch.cuda.amp.common.amp_definitely_not_available", return_value=False),
        mock.patch("torch.cuda.is_bf16_supported", return_value=True),
        FakeTensorMode(),
    ):
        yield


def on_cuda(make: Callable[[], nn.Module]) -> Any:
    """A module whose parameters and buffers are fake CUDA tensors of float32."""
    with torch.device("meta"):
        module = make()
    for child in module.modules():
        for name, parameter in list(child.named_parameters(recurse=False)):
            there = torch.empty(parameter.shape, device="cuda")
            child.register_parameter(name, nn.Parameter(there, parameter.requires_grad))
        for name, buffer in list(child.named_buffers(recurse=False)):
            setattr(child, name, torch.empty(buffer.shape, device="cuda"))
    return module


class Launches(TorchDispatchMode):
    """Counts operators that launch kernels, and the bytes that they read and write, ours looked into."""

    def __init__(self) -> None:
        super().__init__()
        self.count: Counter[str] = Counter()
        self.bytes = 0
        self.square = 0
        """Numbers in the largest result with a row and a column for every token, such as a mask."""
        self.length = 0
        """Of a sample, in tokens."""

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if func is OPERATORS.grouped_glu.default and (
            found := self._products(args[6], args[0], args[2], args[5])
        ):
            with self:
                return grouped_glu.forward_at_once(found, *args[:5], args[7])
        if func is OPERATORS.grouped_glu_backward.default and (
            found := self._products(args[9], args[1], args[5], args[8])
        ):
            with self:
                return grouped_glu.backward_at_once(found, *args[:8], args[10])
        result = func(*args, **kwargs)
        self._note(func, args, kwargs, result)
        return result

    def _products(self, impl: str, x: Tensor, w: Tensor, counts: Tensor) -> Any:
        if impl == "grouped":
            return None
        if len(w) == 1:
            return grouped_glu._products(impl, x, w, counts)
        return _Stand(self, len(w))

    def _note(self, func: Any, args: Any, kwargs: Any, result: Any) -> None:
        results = [leaf for leaf in tree_leaves(result) if isinstance(leaf, Tensor) and leaf.is_cuda]
        views = any(r.alias_info is not None and not r.alias_info.is_write for r in func._schema.returns)
        name = func._schema.name.removeprefix("aten::")
        if not results or views or name in _NOTHING:
            return
        inputs = [leaf for leaf in tree_leaves((args, kwargs)) if isinstance(leaf, Tensor)]
        self.add(name, inputs, results)

    def add(self, name: str, inputs: list[Tensor], results: list[Tensor]) -> None:
        self.count[name] += 1
        # Of a matrix that is broadcast, or of which rows are picked, no more is read than is written.
        most = max(r.numel() * r.itemsize for r in results)
        picks = name in ("index_select", "gather", "index", "embedding", "_embedding_bag")
        for tensor in inputs:
            held = tensor.numel() * tensor.itemsize
            self.bytes += min(held, most) if picks else held
        self.bytes += sum(r.numel() * r.itemsize for r in results)
        squares = [r.numel() for r in results if self.length and r.shape[-2:] == (self.length,) * 2]
        self.square = max(self.square, *squares, 0)


_NOTHING = {"empty", "empty_like", "new_empty", "empty_strided", "new_empty_strided", "_unsafe_view"}
_NOTHING |= {"detach", "set_", "resize_", "_reshape_alias"}


class _Stand:
    """In the place of the kernels that multiply all experts at once: right shapes, one launch each."""

    def __init__(self, launches: Launches, experts: int) -> None:
        self.launches, self.experts = launches, experts

    def rows(self, a: Tensor, b: Tensor, transposed: bool) -> Tensor:
        y = a.new_empty(a.shape[0], b.shape[1 if transposed else 2])
        self.launches.add("grouped product", [a, b], [y])
        return y

    def matrices(self, a: Tensor, b: Tensor) -> Tensor:
        y = a.new_empty(self.experts, a.shape[1], b.shape[1])
        self.launches.add("grouped product", [a, b], [y])
        return y


def layer_step(config: DbrxConfig, tokens: int) -> Launches:
    """The forward and backward pass of one MoE layer in bfloat16, as autocast has it."""
    layer = on_cuda(lambda: MoE(config))
    x = torch.empty(tokens, config.d_model, device="cuda", requires_grad=True)
    with Launches() as launches:
        with torch.autocast("cuda", torch.bfloat16):
            y, _ = layer(x)
        y.sum().backward()
    assert all(p.grad is not None and p.grad.is_cuda for p in layer.parameters())
    return launches


def model_step(model: Dbrx, ids: Tensor, dtype: torch.dtype | None, **inputs: Any) -> Launches:
    """The forward and backward pass of a model, under autocast to ``dtype``."""
    launches = Launches()
    launches.length = ids.shape[1]
    with launches:
        with torch.autocast("cuda", dtype or torch.bfloat16, enabled=dtype is not None):
            output = model(ids, labels=ids, **inputs)
        assert output.loss is not None
        loss = output.loss if output.log_probs is None else output.loss + output.log_probs.sum()
        loss.backward()
    return launches
