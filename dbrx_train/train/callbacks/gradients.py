"""Global gradient norm: logged every step, clipped, and what bad steps are told by."""

from __future__ import annotations

import math

from composer import Callback, Logger, State

from dbrx_train.parallel import clip_grad_norm
from dbrx_train.train.callbacks.bad_steps import BadSteps


class GradientNorm(Callback):  # type: ignore[misc]
    """Logs the L2 norm over all gradients before clipping, and clips to ``max_norm`` if given.

    ``bad_steps`` judges the step by it, if given.
    """

    def __init__(self, max_norm: float | None, bad_steps: BadSteps | None = None) -> None:
        self.max_norm = math.inf if max_norm is None else max_norm
        self.bad_steps = bad_steps

    def after_train_batch(self, state: State, logger: Logger) -> None:
        norm = clip_grad_norm(state.model.parameters(), self.max_norm)
        checked = norm.item() if self.bad_steps is None else self.bad_steps.check(state, logger, norm)
        logger.log_metrics({"gradients/norm": checked})
