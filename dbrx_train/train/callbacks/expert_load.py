"""How evenly the experts are used."""

from __future__ import annotations

import torch
from composer import Callback, Logger, State
from composer.utils import dist

from dbrx_train.model.balance import load_entropy
from dbrx_train.parallel import BatchLoad
from dbrx_train.train.intervals import every
from dbrx_train.train.state import model_of


class ExpertLoad(Callback):  # type: ignore[misc]
    """Counts tokens per expert over all ranks and microbatches.

    Every ``interval`` it logs, per layer, the share of routed tokens that each expert got and the
    normalised entropy of these shares (1.0: all experts equally loaded). After each batch it moves the
    loss-free balancing biases, where the model has them, and before each it begins the count of the batch's
    load, where the balance loss goes by it.
    """

    def __init__(self, interval: str) -> None:
        self.due = every(interval)
        self.batch_counts: torch.Tensor | None = None
        self.window_counts: torch.Tensor | None = None

    def batch_start(self, state: State, logger: Logger) -> None:
        load = model_of(state).batch_load
        if isinstance(load, BatchLoad):
            load.begin()

    def after_forward(self, state: State, logger: Logger) -> None:
        routing = state.outputs.routing
        if routing is not None:
            counts = routing.tokens_per_expert
            self.batch_counts = counts if self.batch_counts is None else self.batch_counts + counts

    def batch_end(self, state: State, logger: Logger) -> None:
        if self.batch_counts is None:
            return
        model = model_of(state)
        counts, self.batch_counts = self.batch_counts, None
        if model.config.loss_free_bias_rate > 0:
            dist.all_reduce(counts)
            model.update_expert_bias(counts)
            counts = counts / dist.get_world_size()
        self.window_counts = counts if self.window_counts is None else self.window_counts + counts
        if self.due(state):
            self._log(logger)

    def _log(self, logger: Logger) -> None:
        assert self.window_counts is not None
        counts, self.window_counts = self.window_counts.double(), None
        dist.all_reduce(counts)
        shares = (counts / counts.sum(-1, keepdim=True).clamp(min=1)).tolist()
        metrics = {
            f"experts/layer{layer:02d}/expert{expert:02d}": share
            for layer, row in enumerate(shares)
            for expert, share in enumerate(row)
        }
        for layer, entropy in enumerate(load_entropy(counts).tolist()):
            metrics[f"experts/layer{layer:02d}/entropy"] = entropy
        logger.log_metrics(metrics)
