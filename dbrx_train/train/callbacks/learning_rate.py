"""Sets the learning rate of each step from the tokens seen."""

from __future__ import annotations

from composer import Callback, Logger, State

from dbrx_train.config import LearningRateConfig
from dbrx_train.schedule import Clock
from dbrx_train.train.lr_schedule import learning_rate_factor


class LearningRate(Callback):  # type: ignore[misc]
    """Stateless, unlike a chain of scheduler steps: the timestamp alone decides."""

    def __init__(self, config: LearningRateConfig, clock: Clock) -> None:
        self.config = config
        self.clock = clock

    def batch_start(self, state: State, logger: Logger) -> None:
        factor = learning_rate_factor(self.config, self.clock, state.timestamp.token.value)
        for group in state.optimizers[0].param_groups:
            group["lr"] = group["peak_lr"] * factor
            logger.log_metrics({f"lr/{group['name']}": group["lr"]})
