"""What a mesh costs a rank: bytes that it sends in a step. What it holds: ``memory.py``.

FSDP pads a parameter's rows to a multiple of the ranks.
"""

from __future__ import annotations

from dataclasses import dataclass

from dbrx_train.model.config import DbrxConfig
from dbrx_train.parallel.mesh import MeshShape
from dbrx_train.plan.collectives import KINDS, collectives
from dbrx_train.plan.units import HasItemsize

__all__ = ["Traffic", "traffic"]


@dataclass(frozen=True)
class Traffic:
    """Bytes that one rank sends in an optimizer step."""

    gathered: int
    """Parameters, before they are used."""
    scattered: int
    """Gradients, within a group."""
    reduced: int
    """Gradients, between replicas."""
    exchanged: float
    """Tokens to experts on other ranks and back, where experts are equally loaded; zero without these."""


def traffic(
    config: DbrxConfig,
    shape: MeshShape,
    *,
    microbatches: int,
    tokens: int,
    param_dtype: HasItemsize | None = None,
    reshard_after_forward: bool = True,
    activation_checkpointing: str = "none",
) -> Traffic:
    """Of a model that ``parallelize`` spread, for a rank's ``tokens`` a microbatch.

    Norms of gradients and counts of tokens, a few bytes each, are left out.
    """
    sent = dict.fromkeys(KINDS, 0.0)
    for each in collectives(
        config,
        shape,
        microbatches=microbatches,
        tokens=tokens,
        param_dtype=param_dtype,
        reshard_after_forward=reshard_after_forward,
        activation_checkpointing=activation_checkpointing,
    ):
        sent[each.kind] += each.sent
    return Traffic(
        gathered=round(sent["gathered"]),
        scattered=round(sent["scattered"]),
        reduced=round(sent["reduced"]),
        exchanged=sent["exchanged"],
    )
