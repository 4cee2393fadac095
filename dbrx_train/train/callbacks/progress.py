"""A progress bar that a person can live with."""

from __future__ import annotations

from typing import Any

from composer import Callback, Logger, State
from composer.utils import dist
from tqdm import tqdm

from dbrx_train.schedule import Clock


class Progress(Callback):  # type: ignore[misc]
    """One line on rank 0: tokens done, loss, learning rate; nothing where there is no terminal.

    Results of an evaluation are printed in any case.
    """

    def __init__(self, clock: Clock, *, enabled: bool) -> None:
        self.clock = clock
        self.disable = None if enabled and dist.get_global_rank() == 0 else True
        self.bar: Any = None

    def fit_start(self, state: State, logger: Logger) -> None:
        self.close(state, logger)  # of a run that was rolled back
        self.bar = tqdm(
            total=self.clock.total_tokens,
            initial=state.timestamp.token.value,
            unit="tok",
            unit_scale=True,
            dynamic_ncols=True,
            desc=state.run_name,
            disable=self.disable,
        )

    def batch_end(self, state: State, logger: Logger) -> None:
        losses = state.total_loss_dict
        self.bar.set_postfix_str(
            f"loss {losses['loss/train/total']:.3f}, lr {state.optimizers[0].param_groups[0]['lr']:.1e}",
            refresh=False,
        )
        self.bar.update(state.timestamp.token.value - self.bar.n)

    def eval_end(self, state: State, logger: Logger) -> None:
        if dist.get_global_rank() == 0:
            label = state.dataloader_label
            loss = float(state.eval_metrics[label]["cross_entropy"].compute())
            seen = state.timestamp.token.value
            tqdm.write(
                f"{seen:>14,} tokens  {label}: loss {loss:.4f}, perplexity {2.718281828459045**loss:,.1f}"
            )

    def fit_end(self, state: State, logger: Logger) -> None:
        self.close(state, logger)  # ahead of what is said at the end

    def close(self, state: State, logger: Logger) -> None:
        if self.bar is not None:
            self.bar.close()
