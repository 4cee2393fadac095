"""Copies of what is saved while training goes on."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from dbrx_train.checkpoint.tensors import Staging


def test_memory_is_pinned_once_and_used_again(monkeypatch: pytest.MonkeyPatch) -> None:
    pinned: list[Tensor] = []

    def pin(tensor: Tensor) -> Tensor:
        pinned.append(tensor)
        return tensor

    monkeypatch.setattr(Tensor, "pin_memory", pin)
    staging = Staging(device_type="cpu")
    weights = {"a": torch.randn(3, 4), "b": torch.randn(5)}
    first = staging.copy(weights)
    places = {name: copy.data_ptr() for name, copy in first.items()}
    assert len(pinned) == 2
    for tensor in weights.values():
        tensor.add_(1.0)
    assert not torch.equal(first["a"], weights["a"]), "training changes no copy"
    second = staging.copy(weights)
    assert {name: copy.data_ptr() for name, copy in second.items()} == places
    assert len(pinned) == 2
    assert all(torch.equal(copy, weights[name]) for name, copy in second.items())


def test_what_is_in_the_hosts_memory_is_copied_each_time() -> None:
    staging, states = Staging(), torch.arange(4)
    one = staging.copy({"random.0": states})
    other = staging.copy({"random.0": torch.arange(7)})  # of another length, as random states may be
    assert one["random.0"].tolist() == [0, 1, 2, 3]
    assert len(other["random.0"]) == 7
    assert one["random.0"].data_ptr() != states.data_ptr()
