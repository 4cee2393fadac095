"""The device that a process trains on, and what of the machine it asks for beforehand."""

from __future__ import annotations

import os
import resource

import torch
from composer.devices import Device, DeviceGPU
from composer.utils import dist, get_device

from dbrx_train.config import ConfigError

__all__ = ["composer_device", "prepare_cuda", "raise_file_limit"]


def composer_device(device: str) -> Device:
    """Composer's device for ``cpu`` or ``gpu``, on which products of float32 are of float32, as the router's
    logits must be; Composer would have TF32.

    A launcher may show each rank its own GPU alone (srun's ``--gpus-per-task=1``): that is number 0 then.

    Raises:
        ConfigError: this machine's ranks are more than the GPUs that they see.
    """
    if device != "gpu":
        return get_device(device)
    ranks, gpus = dist.get_local_world_size(), torch.cuda.device_count()
    if ranks > gpus > 1:
        raise ConfigError(f"device: gpu, but {ranks} ranks of this machine see {gpus} GPUs; start as many")
    return DeviceGPU(dist.get_local_rank() % gpus, allow_tf32=False)


def prepare_cuda() -> None:
    """Set what CUDA's allocator reads when it starts, unless the user has: segments that grow, since uneven
    numbers of tokens per expert leave gaps in fixed ones."""
    names = ("PYTORCH_CUDA_ALLOC_CONF", "PYTORCH_ALLOC_CONF")  # torch 2.9's name for it comes second
    if not any(name in os.environ for name in names):
        os.environ[names[0]] = "expandable_segments:True"


def raise_file_limit() -> None:
    """Allow as many open files as the system lets us: a group of ranks that meet on their CPUs takes a socket
    for each, more than the usual 1,024."""
    _, most = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (most, most))
