"""What became of an optimizer step: written once, by whoever judges it, and read by all.

The latest lies in the ``TrainState``.
"""

from __future__ import annotations

from dataclasses import dataclass

__all__ = ["StepOutcome"]


@dataclass(frozen=True)
class StepOutcome:
    """What became of a step, the same on every rank."""

    step: int
    """Steps that the run had behind it."""
    norm: float
    """L2 norm of all gradients before clipping."""
    loss: float | None = None
    """Of the global batch, auxiliary losses included; None where steps are not judged."""
    cause: str | None = None
    """Why the step was skipped: parameters and optimizer state are as before; None: it was taken."""

    @property
    def taken(self) -> bool:
        return self.cause is None
