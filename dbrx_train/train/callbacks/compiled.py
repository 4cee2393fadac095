"""Says so if nothing was compiled, though it was asked for."""

from __future__ import annotations

import warnings

from composer import Callback, Logger, State
from composer.utils import dist

from dbrx_train.model.compiling import compiled_graphs


class Compiled(Callback):  # type: ignore[misc]
    """Warns after the first step if ``compile: true`` led to no graph: torch falls back without a word."""

    def __init__(self) -> None:
        self.seen = False

    def batch_end(self, state: State, logger: Logger) -> None:
        if not self.seen and compiled_graphs() == 0 and dist.get_global_rank() == 0:
            warnings.warn("compile: true, but torch compiled nothing of this model", stacklevel=1)
        self.seen = True
