"""What FSDP gathers together, by arithmetic on the model's shape: without tensors, and without torch."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from typing import Protocol

from dbrx_train.model.config import DbrxConfig
from dbrx_train.parallel.mesh import MeshShape

__all__ = ["BFLOAT16", "FLOAT32", "ElementType", "HasItemsize", "Unit", "fsdp_units"]


class HasItemsize(Protocol):
    """A dtype, as far as it is asked here; torch's are."""

    @property
    def itemsize(self) -> int: ...


@dataclass(frozen=True)
class ElementType:
    """A dtype for those who have not loaded torch."""

    itemsize: int


FLOAT32 = 4
"""Bytes."""
BFLOAT16 = ElementType(2)


@dataclass(frozen=True)
class Unit:
    """Parameters that are gathered together."""

    padded: int
    """Elements, with padding."""
    ranks: int
    itemsize: int
    gathers: int
    """How often, in a forward and a backward pass."""
    what: str = "dense"
    """``dense`` parameters, or a layer's ``experts``."""
    stride: int = 1
    """How far apart the ranks are that gather it."""
    reduced: int = FLOAT32
    """Bytes of an element of its gradient on its way."""


def fsdp_units(
    config: DbrxConfig,
    shape: MeshShape,
    param_dtype: HasItemsize | None,
    reshard: bool,
    reduce_dtype: HasItemsize | None = None,
) -> list[Unit]:
    """As ``parallelize`` makes them: embedding, parts of blocks, final norm, head."""
    lower = param_dtype.itemsize if param_dtype else FLOAT32
    reduced = reduce_dtype.itemsize if reduce_dtype else FLOAT32
    twice, shard, outer = (2 if reshard else 1), shape.shard, shape.shard // shape.expert
    d, vocab = config.d_model, config.vocab_size
    attention = [(d + 2 * config.n_kv_heads * config.head_dim, d), (d, d)]
    norms = [(d, 1), (d, 1)]
    router = [] if config.is_dense else [(config.num_experts, d)]
    experts = [(config.num_experts * config.ffn_hidden_size, d)] * 3

    def dense(shapes: Iterable[tuple[int, int]], itemsize: int, gathers: int, reduced: int = FLOAT32) -> Unit:
        return Unit(_padded(shapes, shard), shard, itemsize, gathers, reduced=reduced)

    block = []
    exact = [*norms, *router]
    if param_dtype is not None:
        block.append(dense(exact, FLOAT32, 1))
    if shape.expert > 1:
        mine = _padded(experts, shard) // shape.expert
        block.append(Unit(mine, outer, lower, twice, "experts", shape.stride[1], reduced))
    rest = [*attention, *(exact if param_dtype is None else []), *(experts if shape.expert == 1 else [])]
    block.append(dense(rest, lower, twice, reduced))
    return [
        dense([(vocab, d)], FLOAT32, 1),
        *(block * config.n_layers),
        dense([(d, 1)], FLOAT32, 2),
        dense([(vocab, d)], lower, 1, reduced),
    ]


def _padded(shapes: Iterable[tuple[int, int]], ranks: int) -> int:
    return sum(-(-rows // ranks) * ranks * width for rows, width in shapes)
