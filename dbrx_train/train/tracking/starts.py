"""What each start of a run was told: its configuration, and how that differs from the start's before."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import yaml

from dbrx_train.config import RunConfig, flatten, to_yaml
from dbrx_train.files import atomic_write

__all__ = ["CONFIG", "keep_configuration"]

CONFIG = "config.yaml"


def keep_configuration(config: RunConfig, folder: Path) -> dict[str, list[Any]]:
    """Write ``config.yaml``; returns what differs from the start before: key -> [was, is].

    If anything does, the earlier one stays as ``config-N.yaml``, N counting from 1.

    Raises:
        OSError: a file cannot be written.
    """
    path, now = folder / CONFIG, to_yaml(config)
    before = path.read_text(encoding="utf-8", errors="replace") if path.is_file() else now
    if before != now:
        kept = folder / f"config-{1 + len([*folder.glob('config-*.yaml')])}.yaml"
        with atomic_write(kept) as partial:
            partial.write_text(before, encoding="utf-8")
    with atomic_write(path) as partial:
        partial.write_text(now, encoding="utf-8")
    was, is_ = _values(before), _values(now)
    return {
        key: [was.get(key), is_.get(key)]
        for key in dict.fromkeys([*is_, *was])
        if was and was.get(key) != is_.get(key)
    }


def _values(text: str) -> dict[str, Any]:
    try:
        return dict(flatten(yaml.safe_load(text)))
    except (yaml.YAMLError, AttributeError):  # damaged: what it said is not known
        return {}
