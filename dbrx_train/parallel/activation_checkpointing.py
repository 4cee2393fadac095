"""Activations that the backward pass computes again instead of keeping them (arXiv 1604.06174)."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, ExitStack, contextmanager
from functools import partial
from typing import Any

import torch
from torch import nn
from torch.utils.checkpoint import checkpoint, set_checkpoint_early_stop

from dbrx_train.model.config import ACTIVATION_CHECKPOINTING
from dbrx_train.model.decoder import Block, Dbrx
from dbrx_train.model.documents import VARIABLE_LENGTH
from dbrx_train.model.moe.experts import without_answers
from dbrx_train.parallel.expert_parallel import Received, TokenDispatcher
from dbrx_train.parallel.selective import keep_results
from dbrx_train.parallel.torch_patches import kept_unsharded

__all__ = ["checkpoint_activations"]

# What takes nearly all of a block's time. Names that a version of torch does not have are left out.
_DEAR = {
    getattr(torch.ops.aten, name).default
    for name in (
        "mm",
        "_grouped_mm",
        "_scaled_dot_product_flash_attention",
        "_scaled_dot_product_flash_attention_for_cpu",
        "_scaled_dot_product_efficient_attention",
        "_scaled_dot_product_cudnn_attention",
        "_flash_attention_forward",
    )
    if hasattr(torch.ops.aten, name)
} | {torch.ops.dbrx_train.grouped_glu.default}
if VARIABLE_LENGTH is not None:
    _DEAR.add(VARIABLE_LENGTH)


def checkpoint_activations(model: Dbrx, what: str) -> None:
    """Have the backward pass recompute activations of every block. Gradients stay the same, bit for bit.

    - ``full``: of a block its input is kept alone. All is computed again but the experts' last product, whose
      results no gradient depends on; so spread experts are sent their tokens again, and send no answers.
    - ``full_keep_dispatched``: as ``full``, but the tokens that spread experts got are kept, and not sent
      again.
    - ``selective``: results of matrix products and of fused attention are kept too, none computed twice;
      spread experts are sent their tokens again.
    - ``norm_attn_norm``: of attention and its norms the input is kept alone, of the experts everything; so
      DBRX was trained.

    But for the last, spread experts stay gathered from their repetition to their backward pass.

    Raises:
        ValueError: ``what`` is none of ``ACTIVATION_CHECKPOINTING``.
    """
    if what not in ACTIVATION_CHECKPOINTING:
        raise ValueError(f"{what!r} is not one of {', '.join(ACTIVATION_CHECKPOINTING)}")
    for block in model.transformer.blocks:
        if what == "norm_attn_norm":
            _recompute(block.norm_attn_norm)
        elif what != "none":
            _recompute(block, context_fn=partial(_contexts, block, what))


def _contexts(block: Block, what: str) -> tuple[AbstractContextManager[Any], AbstractContextManager[Any]]:
    """Of the forward pass, and of its repetition in the backward pass."""
    experts = block.ffn.experts
    forward: list[AbstractContextManager[Any]] = []
    again: list[AbstractContextManager[Any]] = [kept_unsharded(experts), without_answers(experts.mlp)]
    if what == "selective":
        keep, take = keep_results(_DEAR)
        forward.append(keep)
        again.append(take)
    if isinstance(dispatcher := experts.token_dispatcher, TokenDispatcher):
        received = Received(keeps_tokens=what == "full_keep_dispatched")
        forward.append(dispatcher.keeping(received))
        again.append(dispatcher.keeping(received))
    return _all(forward), _all(again)


@contextmanager
def _all(contexts: list[AbstractContextManager[Any]]) -> Iterator[None]:
    with ExitStack() as stack:
        for each in contexts:
            stack.enter_context(each)
        yield


def _recompute(module: nn.Module, **options: Any) -> None:
    forward: Callable[..., Any] = module.forward

    def recomputed(*args: Any) -> Any:
        # To the end: stopped by an exception amid an operator of our own, as a dense model's last one is,
        # torch would never free what was computed so far. Nothing dear comes after what is needed.
        with set_checkpoint_early_stop(False):
            return checkpoint(forward, *args, use_reentrant=False, **options)

    # The method alone is replaced: a wrapper around the module would rename its parameters.
    module.forward = recomputed
