"""The data mix that was asked for beside the one that was served."""

from __future__ import annotations

import numpy as np
from composer import Callback, Logger, State

from dbrx_train.train.intervals import every


class MixServed(Callback):  # type: ignore[misc]
    """Logs, every ``interval`` and for each source,

    - ``mix/SOURCE/asked``: its weight now, the weights summing to 1;
    - ``mix/SOURCE/served``: its share of the tokens since the last time, and ``…/served_so_far`` of all;
    - ``mix/SOURCE/tokens`` and ``mix/SOURCE/epochs``: what has been read of it so far.
    """

    def __init__(self, interval: str) -> None:
        self.due = every(interval)
        self.logged_at = 0

    def fit_start(self, state: State, logger: Logger) -> None:
        self.logged_at = state.timestamp.sample.value

    def batch_end(self, state: State, logger: Logger) -> None:
        if not self.due(state):
            return
        dataset = state.train_dataloader.dataset
        schedule, sizes, samples = dataset.schedule, dataset.sizes, state.timestamp.sample.value
        tick, earlier = (n // schedule.canonical_nodes for n in (samples, self.logged_at))
        lengths = np.array([dataset.sample_lengths.get(name, 0) for name in schedule.sources])
        totals, before = schedule.totals([tick, earlier])
        tokens, window = totals * lengths, (totals - before) * lengths
        asked = schedule.weights_at(tick, "left")
        for i, name in enumerate(schedule.sources):
            logger.log_metrics(
                {
                    f"mix/{name}/asked": asked[name],
                    f"mix/{name}/served": float(window[i] / window.sum()),
                    f"mix/{name}/served_so_far": float(tokens[i] / tokens.sum()),
                    f"mix/{name}/tokens": int(tokens[i]),
                    f"mix/{name}/epochs": float(totals[i] / sizes[name]),
                }
            )
        self.logged_at = samples
