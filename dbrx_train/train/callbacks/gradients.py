"""Global gradient norm: logged every step, and clipped."""

from __future__ import annotations

import math

from composer import Callback, Logger, State
from torch.distributed.tensor import DTensor
from torch.nn.utils import clip_grad_norm_


class GradientNorm(Callback):  # type: ignore[misc]
    """Logs the L2 norm over all gradients before clipping, and clips to ``max_norm`` if given."""

    def __init__(self, max_norm: float | None) -> None:
        self.max_norm = math.inf if max_norm is None else max_norm

    def after_train_batch(self, state: State, logger: Logger) -> None:
        norm = clip_grad_norm_(state.model.parameters(), self.max_norm)
        if isinstance(norm, DTensor):
            norm = norm.full_tensor()
        logger.log_metrics({"gradients/norm": norm.item()})
