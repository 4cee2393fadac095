"""Outliers among activations."""

from __future__ import annotations

from functools import partial
from typing import Any

import torch
from composer import Callback, Logger, State
from composer.utils import dist
from torch import Tensor, nn

from dbrx_train.schedule import Clock
from dbrx_train.train.intervals import upcoming
from dbrx_train.train.train_state import model_of


class Activations(Callback):  # type: ignore[misc]
    """Logs of every block's output, in the step that ends each ``interval`` and padding included,

    ``activations/layerNN/max_abs``, the largest magnitude, and ``…/rms``, the root of the mean square.
    """

    def __init__(self, interval: str, clock: Clock) -> None:
        self.due = upcoming(interval, clock)
        self.watching = False
        self.squares: Tensor | None = None
        """[2, L] float64: sums of squares, and how many values they are of."""
        self.largest: Tensor | None = None

    def fit_start(self, state: State, logger: Logger) -> None:
        blocks = model_of(state).transformer.blocks
        # On the block itself, so that one that is computed again is seen once
        self.hooks = [b.register_forward_hook(partial(self._see, i)) for i, b in enumerate(blocks)]

    def batch_start(self, state: State, logger: Logger) -> None:
        self.watching = self.due(state)

    @torch.no_grad()
    def _see(self, layer: int, block: nn.Module, args: Any, output: tuple[Tensor, Any]) -> None:
        if not self.watching:
            return
        x = output[0].detach()
        if self.squares is None or self.largest is None:
            self.squares = torch.zeros(2, len(self.hooks), dtype=torch.float64, device=x.device)
            self.largest = torch.zeros(len(self.hooks), device=x.device)
        self.squares[0, layer] += torch.linalg.vector_norm(x, dtype=torch.float32).double().square()
        self.squares[1, layer] += x.numel()
        self.largest[layer] = torch.maximum(self.largest[layer], torch.linalg.vector_norm(x, torch.inf))

    def batch_end(self, state: State, logger: Logger) -> None:
        self.watching = False
        if self.squares is None or self.largest is None:
            return
        (squares, count), largest = self.squares, self.largest
        dist.all_reduce(self.squares)
        dist.all_reduce(largest, "MAX")
        self.squares = self.largest = None
        found = {"max_abs": largest.tolist(), "rms": (squares / count).sqrt().tolist()}
        for name, values in found.items():
            logger.log_metrics({f"activations/layer{i:02d}/{name}": v for i, v in enumerate(values)})
