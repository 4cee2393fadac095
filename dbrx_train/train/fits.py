"""Whether a run's state fits the machine at all, found out before anything of it is allocated."""

from __future__ import annotations

import psutil
import torch
from composer.utils import dist

from dbrx_train.config import ConfigError, RunConfig
from dbrx_train.plan.memory import STATES
from dbrx_train.plan.planner import held

__all__ = ["check_fits"]


def check_fits(config: RunConfig, device: str) -> None:
    """Weights, gradients and optimizer state have room; of adapters' runs, the weights alone are looked at.

    What is allocated besides, such as activations, is an estimate and no reason to refuse.

    Raises:
        ConfigError: they have not.
    """
    kinds = STATES if config.lora.rank is None else STATES[:1]
    peak = held(config, dist.get_world_size()).memory.peak
    need, where = sum(peak[kind] for kind in kinds), "a GPU"
    if device == "gpu" and not config.parallelism.cpu_offload:
        have = torch.cuda.get_device_properties(torch.cuda.current_device()).total_memory
    else:
        need, have, where = need * dist.get_local_world_size(), psutil.virtual_memory().total, "this machine"
    if need > have:
        what = ", gradients and optimizer state" if len(kinds) > 1 else ""
        raise ConfigError(
            f"model: weights{what} of {config.model.num_params / 1e9:.3g}B parameters need "
            f"{need / 1e9:,.0f} GB on {where}, which has {have / 1e9:,.0f}; give `model:` a smaller shape "
            f"(left out, it is DBRX's own), or shard it over more ranks: `dbrx-train plan` says how many"
        )
