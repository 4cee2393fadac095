"""The processes that a run consists of, and what it ran on, for the record."""

from __future__ import annotations

import importlib.metadata
import os
import platform
import re
import shlex
import subprocess
import sys
from collections.abc import Mapping

from composer.utils import dist

from dbrx_train import __version__
from dbrx_train.redact import mask, mask_argument
from dbrx_train.train.devices import composer_device, prepare_cuda, raise_file_limit

_PACKAGES = ("torch", "mosaicml", "mosaicml-streaming", "mlflow-skinny", "numpy", "tiktoken")


def join_ranks(device: str, timeout: float) -> None:
    """Connect the processes that ``composer``, ``torchrun`` or ``srun`` started; one alone needs no launcher.

    ``timeout``: seconds after which ranks give up waiting for each other.

    Raises:
        ConfigError: there are more ranks than GPUs.
    """
    if "SLURM_STEP_NUM_TASKS" in os.environ and "RANK" not in os.environ:
        os.environ.update(_from_slurm(os.environ))
    if "GROUP_RANK" in os.environ:
        # torchrun's name for it; Composer asks for its own when it loads a checkpoint on several ranks.
        os.environ.setdefault("NODE_RANK", os.environ["GROUP_RANK"])
    raise_file_limit()
    if device == "gpu":
        prepare_cuda()
    dist.initialize_dist(composer_device(device), timeout)


def print_rank0(text: str) -> None:
    """Print a line, once for all ranks."""
    if dist.get_global_rank() == 0:
        print(mask(text), flush=True)


def _from_slurm(task: Mapping[str, str]) -> dict[str, str]:
    """What torch wants to be told, from what srun tells its tasks."""
    node, job, step = (int(task[f"SLURM_{name}"]) for name in ("NODEID", "JOB_ID", "STEP_ID"))
    # "4(x2),3": four tasks on each of the first two nodes, three on the next
    per_node = re.findall(r"(\d+)(?:\(x(\d+)\))?", task["SLURM_STEP_TASKS_PER_NODE"])
    tasks = [int(count) for count, times in per_node for _ in range(int(times or 1))]
    found = {
        "RANK": task["SLURM_PROCID"],
        "WORLD_SIZE": task["SLURM_STEP_NUM_TASKS"],
        "LOCAL_RANK": task["SLURM_LOCALID"],
        "LOCAL_WORLD_SIZE": str(tasks[node]),
        "NODE_RANK": str(node),
        "MASTER_PORT": str(20000 + (job + 997 * step) % 10000),  # below the ports that systems hand out
    }
    if "MASTER_ADDR" not in task:
        command = ["scontrol", "show", "hostnames", task["SLURM_STEP_NODELIST"]]
        hosts = subprocess.run(command, capture_output=True, text=True, check=True).stdout.split()
        found["MASTER_ADDR"] = hosts[0]
    return {key: value for key, value in found.items() if key not in task}


def versions() -> dict[str, str]:
    """Of Python, this package and those that it leans on."""
    packages = {name: importlib.metadata.version(name) for name in _PACKAGES}
    return packages | {"dbrx-train": __version__, "python": platform.python_version()}


def describe() -> dict[str, str]:
    """Versions, machine, world size, command line and git state."""
    return {f"env.{name}": version for name, version in versions().items()} | {
        "env.platform": platform.platform(),
        "env.world_size": str(dist.get_world_size()),
        "env.command": shlex.join(map(mask_argument, sys.argv)),
        "env.git": _git_state(),
    }


def _git_state() -> str:
    try:
        done = subprocess.run(
            ["git", "describe", "--always", "--dirty", "--abbrev=40"],
            capture_output=True,
            text=True,
            timeout=10,
            check=True,
        )
    except (OSError, subprocess.SubprocessError):
        return "not a git checkout"
    return done.stdout.strip()
