"""What a run ran on, for the record."""

from __future__ import annotations

import importlib.metadata
import platform
import shlex
import subprocess
import sys

from composer.utils import dist

_PACKAGES = ("torch", "mosaicml", "mosaicml-streaming", "mlflow-skinny", "numpy", "tiktoken")


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
