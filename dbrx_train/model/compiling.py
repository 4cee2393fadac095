"""torch.compile where it helps: attention with its norms, whose many small kernels it joins.

Routing and experts stay as they are. How many tokens an expert gets changes with every step, and their
products are kernels of their own already.
"""

from __future__ import annotations

from typing import Any

import torch

from dbrx_train.model.decoder import Dbrx

__all__ = ["compile_dense", "compiled_graphs"]


def compile_dense(model: Dbrx, backend: str = "inductor") -> None:
    """Have attention and the norms of each block compiled at their first call; in place, no name changes.

    To be called before activation checkpointing: hooks that gather a sharded norm end a graph, which is no
    harm inside a checkpoint, but around one leaves no graph at all.
    """
    for block in model.transformer.blocks:
        dense = block.norm_attn_norm
        dense.forward = torch.compile(dense.forward, backend=backend)


def compiled_graphs() -> int | None:
    """How many graphs this process has compiled; None where this version of torch does not say."""
    try:
        dynamo: Any = torch._dynamo
        return int(dynamo.utils.counters["stats"]["unique_graphs"])
    except (AttributeError, ImportError, TypeError):
        return None
