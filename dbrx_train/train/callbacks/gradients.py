"""Global gradient norm: logged every step, clipped, and what a step is judged by."""

from __future__ import annotations

import math

from composer import Callback, Logger, State

from dbrx_train.parallel import clip_grad_norm
from dbrx_train.train.callbacks.bad_steps import BadSteps
from dbrx_train.train.step_outcome import StepOutcome
from dbrx_train.train.train_state import TrainState, callback_of


class GradientNorm(Callback):  # type: ignore[misc]
    """Logs the L2 norm over all gradients before clipping, and clips to ``max_norm`` if given.

    ``bad_steps`` judges the step by it, if given; else every step is taken.
    """

    def __init__(self, max_norm: float | None, bad_steps: BadSteps | None = None) -> None:
        self.max_norm = math.inf if max_norm is None else max_norm
        self.bad_steps = bad_steps

    def after_train_batch(self, state: State, logger: Logger) -> None:
        norm = clip_grad_norm(state.model.parameters(), self.max_norm)
        if self.bad_steps is None:
            outcome = StepOutcome(state.timestamp.batch.value, norm=norm.item())
        else:
            outcome = self.bad_steps.judge_step(state, logger, norm)
        callback_of(state, TrainState).judged(outcome)
        logger.log_metrics({"gradients/norm": outcome.norm})
