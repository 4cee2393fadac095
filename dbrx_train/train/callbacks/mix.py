"""The data mix that was asked for beside the one that was served."""

from __future__ import annotations

from composer import Callback, Logger, State


class MixServed(Callback):  # type: ignore[misc]
    """Logs, every ``interval`` batches and for each source,

    - ``mix/SOURCE/asked``: its weight now, the weights summing to 1;
    - ``mix/SOURCE/served``: its share of the samples since the last time, and ``…/served_so_far`` of all;
    - ``mix/SOURCE/tokens`` and ``mix/SOURCE/epochs``: what has been read of it so far.
    """

    def __init__(self, interval: int) -> None:
        self.interval = interval
        self.logged_at = 0

    def fit_start(self, state: State, logger: Logger) -> None:
        self.logged_at = state.timestamp.sample.value

    def batch_end(self, state: State, logger: Logger) -> None:
        if state.timestamp.batch.value % self.interval:
            return
        dataset = state.train_dataloader.dataset
        schedule, sizes, samples = dataset.schedule, dataset.sizes, state.timestamp.sample.value
        tick = samples // schedule.canonical_nodes
        now, before = schedule.totals([tick, self.logged_at // schedule.canonical_nodes]).tolist()
        asked = schedule.weights_at(tick, "left")
        for name, total, earlier in zip(schedule.sources, now, before, strict=True):
            logger.log_metrics(
                {
                    f"mix/{name}/asked": asked[name],
                    f"mix/{name}/served": (total - earlier) / max(1, samples - self.logged_at),
                    f"mix/{name}/served_so_far": total / samples,
                    f"mix/{name}/tokens": total * dataset.seq_len,
                    f"mix/{name}/epochs": total / sizes[name],
                }
            )
        self.logged_at = samples
