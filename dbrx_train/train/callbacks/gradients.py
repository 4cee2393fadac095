"""Global gradient norm: logged every step, and clipped."""

from __future__ import annotations

import math

from composer import Callback, Logger, State

from dbrx_train.parallel import clip_grad_norm


class GradientNorm(Callback):  # type: ignore[misc]
    """Logs the L2 norm over all gradients before clipping, and clips to ``max_norm`` if given."""

    def __init__(self, max_norm: float | None) -> None:
        self.max_norm = math.inf if max_norm is None else max_norm

    def after_train_batch(self, state: State, logger: Logger) -> None:
        norm = clip_grad_norm(state.model.parameters(), self.max_norm)
        logger.log_metrics({"gradients/norm": norm.item()})
