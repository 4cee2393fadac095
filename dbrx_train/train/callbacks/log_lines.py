"""How training goes, for logs: a line every so often where there is no terminal for a progress bar."""

from __future__ import annotations

import time

from composer import Callback, Logger, State

from dbrx_train.schedule import Clock
from dbrx_train.train.callbacks.memory import peak_memory
from dbrx_train.train.intervals import every
from dbrx_train.train.train_state import outcome_of


class LogLines(Callback):  # type: ignore[misc]
    """Prints step, tokens, loss, learning rate, gradient norm, tokens/s, MFU, memory and time left.

    Rates are over the steps since the line before, evaluations and saves among them. Loss and norm are of
    the last step and the global batch. ``peak_flops``: of one device.
    """

    def __init__(self, interval: str, clock: Clock, peak_flops: float) -> None:
        self.due, self.clock, self.peak_flops = every(interval), clock, peak_flops
        self._begin(0)

    def _begin(self, token: int) -> None:
        self.token, self.at, self.flops = token, time.monotonic(), 0.0

    def fit_start(self, state: State, logger: Logger) -> None:
        self._begin(state.timestamp.token.value)

    def batch_end(self, state: State, logger: Logger) -> None:
        self.flops += state.model.flops_per_batch(state.batch)
        if not self.due(state):
            return
        step, token = state.timestamp.batch.value, state.timestamp.token.value
        outcome, seconds = outcome_of(state), time.monotonic() - self.at
        loss = state.total_loss_dict["loss/train/total"] if outcome.loss is None else outcome.loss
        rate = (token - self.token) / seconds
        left = (self.clock.total_tokens - token) / rate
        print(
            f"step {step:,} of {self.clock.total_batches:,}, {token:,} tokens: loss {loss:.4f}, "
            f"lr {state.optimizers[0].param_groups[0]['lr']:.2e}, norm {outcome.norm:.3g}, "
            f"{rate:,.0f} tokens/s, MFU {self.flops / seconds / self.peak_flops:.1%}, "
            f"{peak_memory() / 1e9:.1f} GB, {_duration(left)} left",
            flush=True,
        )
        self._begin(token)


def _duration(seconds: float) -> str:
    """Days and hours, hours and minutes, or minutes and seconds."""
    minutes, second = divmod(round(seconds), 60)
    hours, minute = divmod(minutes, 60)
    days, hour = divmod(hours, 24)
    if days:
        return f"{days}d {hour}h"
    return f"{hour}h {minute}m" if hour else f"{minute}m {second}s"
