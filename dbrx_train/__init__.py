"""Train fine-grained mixture-of-experts language models the way DBRX was trained.

The public names are imported when first used, so that ``import dbrx_train`` costs nothing.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from dbrx_train.data.mix.schedule import MixSchedule
    from dbrx_train.model.config import DbrxConfig
    from dbrx_train.model.decoder import Dbrx
    from dbrx_train.model.moe.layer import MoE
    from dbrx_train.schedule import Clock

__version__ = "0.1.0"
__all__ = ["Clock", "Dbrx", "DbrxConfig", "MixSchedule", "MoE"]

_HOME = {
    "Clock": "dbrx_train.schedule",
    "Dbrx": "dbrx_train.model.decoder",
    "DbrxConfig": "dbrx_train.model.config",
    "MixSchedule": "dbrx_train.data.mix.schedule",
    "MoE": "dbrx_train.model.moe.layer",
}


def __getattr__(name: str) -> Any:
    if name not in _HOME:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(importlib.import_module(_HOME[name]), name)


def __dir__() -> list[str]:
    return sorted([*globals(), *_HOME])
