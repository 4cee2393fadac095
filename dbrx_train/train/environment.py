"""The processes that a run consists of, and what it ran on, for the record."""

from __future__ import annotations

import importlib.metadata
import os
import platform
import shlex
import subprocess
import sys

from composer.utils import dist, get_device

_PACKAGES = ("torch", "mosaicml", "mosaicml-streaming", "mlflow-skinny", "numpy", "tiktoken")


def join_ranks(device: str, timeout: float) -> None:
    """Connect the processes that ``composer`` or ``torchrun`` started; a single one needs no launcher.

    ``timeout``: seconds after which ranks give up waiting for each other.
    """
    if "GROUP_RANK" in os.environ:
        # torchrun's name for it; Composer asks for its own when it loads a checkpoint on several ranks.
        os.environ.setdefault("NODE_RANK", os.environ["GROUP_RANK"])
    dist.initialize_dist(get_device(device), timeout)


def describe() -> dict[str, str]:
    """Versions, machine, world size, command line and git state."""
    facts = {f"env.{name}": importlib.metadata.version(name) for name in _PACKAGES}
    return facts | {
        "env.dbrx-train": importlib.metadata.version("dbrx-train"),
        "env.python": platform.python_version(),
        "env.platform": platform.platform(),
        "env.world_size": str(dist.get_world_size()),
        "env.command": shlex.join(sys.argv),
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
