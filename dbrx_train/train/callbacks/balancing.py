"""Balances the experts: not a metric, but part of what training computes."""

from __future__ import annotations

from composer import Callback, Logger, State
from composer.utils import dist
from torch import Tensor

from dbrx_train.parallel import GlobalBatchLoad
from dbrx_train.train.train_state import model_of, outcome_of


class ExpertBalancing(Callback):  # type: ignore[misc]
    """Begins the count of a batch's load, where the balance loss goes by it (``optimization.balance_over``),
    and moves the loss-free balancing biases by it afterwards, where the model has them.

    A step that was skipped moves nothing.
    """

    def __init__(self) -> None:
        self.load: Tensor | None = None
        """[L, E], this rank's tokens per expert in the batch so far."""

    def batch_start(self, state: State, logger: Logger) -> None:
        self.load = None
        load = model_of(state).batch_load
        if isinstance(load, GlobalBatchLoad):
            load.begin()

    def after_forward(self, state: State, logger: Logger) -> None:
        routing = state.outputs.routing
        if routing is not None and model_of(state).config.loss_free_bias_rate > 0:
            counts = routing.tokens_per_expert
            self.load = counts if self.load is None else self.load + counts

    def batch_end(self, state: State, logger: Logger) -> None:
        if self.load is not None and outcome_of(state).taken:
            load = self.load.clone()
            dist.all_reduce(load)
            model_of(state).update_expert_bias(load)
