"""How a model is spread over many ranks: the mesh, and sharding over it. torch.distributed alone.

The names are imported when first used, so that a mesh can be reckoned with before torch is loaded.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from dbrx_train.parallel.activation_checkpointing import checkpoint_activations
    from dbrx_train.parallel.fsdp import parallelize
    from dbrx_train.parallel.global_batch_load import GlobalBatchLoad
    from dbrx_train.parallel.grad_norm import clip_grad_norm
    from dbrx_train.parallel.mesh import MeshShape

__all__ = [
    "GlobalBatchLoad",
    "MeshShape",
    "checkpoint_activations",
    "clip_grad_norm",
    "parallelize",
]

_HOME = {
    "GlobalBatchLoad": "global_batch_load",
    "MeshShape": "mesh",
    "checkpoint_activations": "activation_checkpointing",
    "clip_grad_norm": "grad_norm",
    "parallelize": "fsdp",
}


def __getattr__(name: str) -> Any:
    if name not in _HOME:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(importlib.import_module(f"{__name__}.{_HOME[name]}"), name)
