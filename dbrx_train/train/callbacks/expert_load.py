"""How evenly the experts are used, and how sure the routers are."""

from __future__ import annotations

import torch
from composer import Callback, Logger, State
from composer.utils import dist
from torch import Tensor

from dbrx_train.model.moe.load_balancing import RoutingStats, load_entropy
from dbrx_train.train.intervals import every
from dbrx_train.train.train_state import outcome_of


class ExpertLoad(Callback):  # type: ignore[misc]
    """Counts tokens per expert over all ranks and microbatches.

    Every ``interval`` it logs, per layer and over the tokens since the last time,

    - the share of routed tokens that each expert got, the normalised entropy of these shares (1.0: all
      experts equally loaded), the tokens of the least and of the most loaded expert, and the coefficient of
      variation of the load;
    - of the router, a token's mean entropy, the mean of logsumexp^2, and the largest logit.

    A batch whose step was skipped does not count.
    """

    def __init__(self, interval: str) -> None:
        self.due = every(interval)
        self.batch_counts: Tensor | None = None
        self.window_counts: Tensor | None = None
        self.batch_routers: list[RoutingStats] = []
        self.routers = _Routers()

    def after_forward(self, state: State, logger: Logger) -> None:
        routing = state.outputs.routing
        if routing is not None:
            counts = routing.tokens_per_expert
            self.batch_counts = counts if self.batch_counts is None else self.batch_counts + counts
            self.batch_routers.append(routing)

    def batch_end(self, state: State, logger: Logger) -> None:
        if self.batch_counts is None:
            return
        counts, self.batch_counts = self.batch_counts, None
        routers, self.batch_routers = self.batch_routers, []
        if not outcome_of(state).taken:
            return
        for routing in routers:
            self.routers.add(routing)
        self.window_counts = counts if self.window_counts is None else self.window_counts + counts
        if self.due(state):
            self._log(logger)

    def _log(self, logger: Logger) -> None:
        assert self.window_counts is not None
        counts, self.window_counts = self.window_counts.double(), None
        dist.all_reduce(counts)
        shares = (counts / counts.sum(-1, keepdim=True).clamp(min=1)).tolist()
        per_layer = {
            "experts/layer{:02d}/entropy": load_entropy(counts),
            "experts/layer{:02d}/tokens_min": counts.amin(-1),
            "experts/layer{:02d}/tokens_max": counts.amax(-1),
            "experts/layer{:02d}/cv": counts.std(-1, correction=0) / counts.mean(-1).clamp(min=1e-9),
            **self.routers.take(),
        }
        metrics = {
            f"experts/layer{layer:02d}/expert{expert:02d}": share
            for layer, row in enumerate(shares)
            for expert, share in enumerate(row)
        }
        for name, values in per_layer.items():
            metrics |= {name.format(layer): value for layer, value in enumerate(values.tolist())}
        logger.log_metrics(metrics)


class _Routers:
    """Means over tokens of what the routers did, and their largest logits, since the last ``take``."""

    def __init__(self) -> None:
        self.sums: Tensor | None = None
        """[3, L] float64: tokens' choices, and by them the weighted entropy and z."""
        self.largest: Tensor | None = None

    def add(self, routing: RoutingStats) -> None:
        choices = routing.tokens_per_expert.sum(-1).double()
        terms = torch.stack((choices, choices * routing.token_entropy, choices * routing.z))
        self.sums = terms if self.sums is None else self.sums + terms
        largest = routing.max_logit
        self.largest = largest if self.largest is None else torch.maximum(self.largest, largest)

    def take(self) -> dict[str, Tensor]:
        """[L] each, over all ranks."""
        assert self.sums is not None
        assert self.largest is not None
        (choices, entropy, z), largest = self.sums, self.largest
        dist.all_reduce(self.sums)
        dist.all_reduce(largest, "MAX")
        self.sums = self.largest = None
        choices = choices.clamp(min=1)
        return {
            "router/layer{:02d}/entropy": entropy / choices,
            "router/layer{:02d}/z": z / choices,
            "router/layer{:02d}/max_logit": largest,
        }
