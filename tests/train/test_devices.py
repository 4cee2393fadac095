"""What a run asks of its machine, told from what it would ask of a GPU that is not there."""

from __future__ import annotations

import gc
import os
import resource
from collections.abc import Iterator
from typing import Any
from unittest import mock

import pytest
import torch
from composer.devices import DeviceGPU

from dbrx_train.config import ConfigError
from dbrx_train.train import devices
from dbrx_train.train.callbacks.garbage import GarbageCollection
from dbrx_train.train.data import count_tokens


@pytest.fixture
def gpus(monkeypatch: pytest.MonkeyPatch) -> Iterator[mock.Mock]:
    """How many GPUs a process sees; its settings of TF32 are put back."""
    count = mock.Mock(return_value=8)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", count)
    current = [0]
    monkeypatch.setattr(torch.cuda, "set_device", lambda device: current.__setitem__(0, device.index))
    monkeypatch.setattr(torch.cuda, "current_device", lambda: current[0])
    monkeypatch.setenv("LOCAL_RANK", "3")
    monkeypatch.setenv("LOCAL_WORLD_SIZE", "8")
    monkeypatch.setenv("WORLD_SIZE", "8")
    monkeypatch.setenv("RANK", "3")
    backends: tuple[Any, ...] = (torch.backends.cuda.matmul, torch.backends.cudnn)
    before = [backend.allow_tf32 for backend in backends]
    yield count
    for backend, allowed in zip(backends, before, strict=True):
        backend.allow_tf32 = allowed


def place(device: object) -> str:
    assert isinstance(device, DeviceGPU)
    return str(device._device)


@pytest.mark.usefixtures("gpus")
def test_float32_is_no_tf32() -> None:
    torch.backends.cuda.matmul.allow_tf32 = torch.backends.cudnn.allow_tf32 = True
    assert place(devices.composer_device("gpu")) == "cuda:3"
    assert not torch.backends.cuda.matmul.allow_tf32
    assert not torch.backends.cudnn.allow_tf32


def test_a_rank_that_sees_one_gpu_alone_takes_it(gpus: mock.Mock) -> None:
    gpus.return_value = 1
    assert place(devices.composer_device("gpu")) == "cuda:0"


def test_more_ranks_than_gpus_are_refused(gpus: mock.Mock) -> None:
    gpus.return_value = 4
    with pytest.raises(
        ConfigError, match="device: gpu, but 8 ranks of this machine see 4 GPUs; start as many"
    ):
        devices.composer_device("gpu")


def test_segments_grow_unless_the_user_says_otherwise(monkeypatch: pytest.MonkeyPatch) -> None:
    name = "PYTORCH_CUDA_ALLOC_CONF"
    monkeypatch.delenv(name, raising=False)
    monkeypatch.delenv("PYTORCH_ALLOC_CONF", raising=False)
    devices.prepare_cuda()
    assert os.environ[name] == "expandable_segments:True"
    monkeypatch.setenv(name, "max_split_size_mb:64")
    devices.prepare_cuda()
    assert os.environ[name] == "max_split_size_mb:64"


def test_as_many_files_as_may_be(monkeypatch: pytest.MonkeyPatch) -> None:
    soft, most = resource.getrlimit(resource.RLIMIT_NOFILE)
    few = min(soft, 512)
    resource.setrlimit(resource.RLIMIT_NOFILE, (few, most))
    try:
        devices.raise_file_limit()
        assert resource.getrlimit(resource.RLIMIT_NOFILE) == (most, most)
    finally:
        resource.setrlimit(resource.RLIMIT_NOFILE, (soft, most))


def test_garbage_is_collected_at_the_same_steps() -> None:
    callback, state = GarbageCollection(steps=10), mock.Mock()
    collected = []
    for step in range(1, 31):
        if step == 1:
            callback.fit_start(state, mock.Mock())
            callback.fit_start(state, mock.Mock())  # again, as after a roll-back
            assert not gc.isenabled()
        state.timestamp.batch.value = step
        with mock.patch("gc.collect", side_effect=lambda step=step: collected.append(step)):
            callback.batch_end(state, mock.Mock())
    callback.close(state, mock.Mock())
    assert collected == [10, 20, 30]
    assert gc.isenabled()
    assert gc.get_freeze_count() == 0


def test_tokens_are_counted_without_a_look_at_the_device() -> None:
    batch = {"input_ids": torch.empty(2, 8, device="meta"), "loss_terms": [3, 4]}
    assert count_tokens(batch) == {"total": 16, "loss_generating": 7}
