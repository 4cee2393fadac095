"""What a mesh costs a rank of a run: bytes that it sends in a step, and bytes that it holds.

FSDP pads a parameter's rows to a multiple of the ranks.
"""

from __future__ import annotations

from dataclasses import dataclass

from dbrx_train.config import OptimizerConfig, RunConfig
from dbrx_train.model.config import DbrxConfig
from dbrx_train.parallel.mesh import MeshShape
from dbrx_train.plan.adapters import frozen_memory
from dbrx_train.plan.collectives import KINDS, Collective, collectives
from dbrx_train.plan.memory import Memory, memory
from dbrx_train.plan.units import BFLOAT16, ElementType, HasItemsize
from dbrx_train.plan.world import Microbatch

__all__ = ["Traffic", "param_type", "reduce_type", "run_collectives", "run_memory", "state_bytes", "traffic"]


def param_type(config: RunConfig) -> ElementType | None:
    """What the large matrices are gathered in; None for float32."""
    return BFLOAT16 if config.precision == "amp_bf16" else None


def reduce_type(config: RunConfig) -> ElementType | None:
    """What their gradients are scattered in; None for float32."""
    return BFLOAT16 if config.parallelism.reduce_dtype == "bfloat16" else None


def state_bytes(config: OptimizerConfig) -> int:
    """Bytes of optimizer state a parameter."""
    return 4 if config.name == "lionw" or config.state_dtype == "bfloat16" else 8


def run_memory(
    config: RunConfig, shape: MeshShape, batch: Microbatch, skew: float, *, keeps_gathered: bool = False
) -> Memory:
    """What a rank holds; ``skew`` as in ``memory``. ``keeps_gathered``: whatever the run's options say."""
    whole = memory(
        config.model,
        shape,
        tokens=batch.tokens,
        param_dtype=param_type(config),
        reduce_dtype=reduce_type(config),
        activation_checkpointing=config.parallelism.activation_checkpointing,
        reshard_after_forward=config.parallelism.reshard_after_forward and not keeps_gathered,
        accumulates=batch.per_step > 1,
        skew=skew,
        state_bytes=state_bytes(config.optimization.optimizer),
    )
    return whole if config.lora.rank is None else frozen_memory(config, shape, param_type(config), whole)


def run_collectives(config: RunConfig, shape: MeshShape, batch: Microbatch) -> list[Collective]:
    """What a rank sends in a step."""
    return collectives(
        config.model,
        shape,
        microbatches=batch.per_step,
        tokens=batch.tokens,
        param_dtype=param_type(config),
        reduce_dtype=reduce_type(config),
        reshard_after_forward=config.parallelism.reshard_after_forward,
        activation_checkpointing=config.parallelism.activation_checkpointing,
    )


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
    reduce_dtype: HasItemsize | None = None,
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
        reduce_dtype=reduce_dtype,
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
