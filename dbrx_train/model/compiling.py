"""torch.compile where it helps: attention with its norms, whose many small kernels it joins.

Routing and experts stay as they are. How many tokens an expert gets changes with every step, and their
products are kernels of their own already.
"""

from __future__ import annotations

from dbrx_train.model.decoder import Dbrx

__all__ = ["compile_dense"]


def compile_dense(model: Dbrx) -> None:
    """Have attention and the norms of each block compiled at their first call; in place, no name changes."""
    for block in model.transformer.blocks:
        block.norm_attn_norm.compile()
