"""Norms of gradients and parameters, by what they belong to."""

from __future__ import annotations

from composer import Callback, Logger, State
from torch import Tensor

from dbrx_train.model.init import is_norm
from dbrx_train.model.lora import is_factor
from dbrx_train.parallel.grad_norm import group_norms
from dbrx_train.schedule import Clock
from dbrx_train.train.intervals import upcoming
from dbrx_train.train.train_state import model_of

_PARTS = {
    "wte": "embedding",
    "attn": "attention",
    "router": "router",
    "experts": "experts",
    "lm_head": "head",
}


def group_of(name: str) -> str:
    """The group of a parameter, by its name: embedding, attention, router, experts, norms, head, adapters."""
    if is_factor(name):
        return "adapters"
    if is_norm(name):
        return "norms"
    return next(_PARTS[part] for part in name.split(".") if part in _PARTS)


class GroupNorms(Callback):  # type: ignore[misc]
    """Every ``interval``, logs ``gradients/GROUP``, before clipping, and ``parameters/GROUP``, before a step.

    To be called ahead of the callback that clips.
    """

    def __init__(self, interval: str, clock: Clock) -> None:
        self.due = upcoming(interval, clock)

    def after_train_batch(self, state: State, logger: Logger) -> None:
        if not self.due(state):
            return
        groups: dict[str, list[Tensor]] = {}
        for name, parameter in model_of(state).named_parameters():
            groups.setdefault(f"parameters/{group_of(name)}", []).append(parameter)
            if parameter.grad is not None:
                groups.setdefault(f"gradients/{group_of(name)}", []).append(parameter.grad)
        logger.log_metrics(group_norms(groups))
