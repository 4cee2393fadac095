"""What ranks send each other in an optimizer step, collective by collective, and over which links.

Bytes are those of the usual ring algorithms: of a tensor of B bytes, gathered from n ranks or scattered over
them, each rank sends (n - 1) / n B; all-reduced over them, twice that.
"""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass

from dbrx_train.model.config import DbrxConfig
from dbrx_train.parallel.mesh import MeshShape
from dbrx_train.plan.hardware import GPU
from dbrx_train.plan.step_time import CALIBRATED, Calibration
from dbrx_train.plan.units import FLOAT32, HasItemsize, fsdp_units

__all__ = ["KINDS", "Collective", "Way", "collectives"]

KINDS = ("gathered", "scattered", "reduced", "exchanged")
_INT64 = 8


@dataclass(frozen=True)
class Way:
    """How long bytes are on their way, and over which link, ``NVLink`` or the ``network``, longest."""

    slower: str
    seconds: float


@dataclass(frozen=True)
class Collective:
    """Collectives of one kind, over one axis of the mesh, in an optimizer step.

    Ranks of a group are ``stride`` apart, and groups begin at multiples of their extent, as those of a mesh
    do whose last axis is innermost. Machines hold consecutive ranks.
    """

    kind: str
    """One of ``KINDS``; ``exchanged`` is all-to-all."""
    what: str
    """``dense`` parameters, ``experts``, or ``tokens``."""
    sent: float
    """Bytes that a rank sends."""
    ranks: int
    stride: int
    calls: int

    def machines(self, machine: int) -> int:
        """How many machines of so many GPUs a group lies on."""
        within = max(1, min(self.ranks, machine // self.stride))
        return -(-self.ranks // within)

    def over_network(self, machine: int) -> float:
        """Bytes of ``sent`` that leave the machine, a rank's share.

        In a ring through m machines m of its edges lie between them; of an all-to-all's partners it is those
        on other machines.
        """
        machines = self.machines(machine)
        if machines == 1:
            return 0.0
        if self.kind == "exchanged":
            within = self.ranks / machines
            return self.sent * (self.ranks - within) / (self.ranks - 1)
        return self.sent * machines / self.ranks

    def way(
        self, gpu: GPU, machine: int, network: float | None = None, constants: Calibration = CALIBRATED
    ) -> Way:
        """Alone on its links: the slower of the two, and the hops from rank to rank.

        ``network``: bytes/s of a GPU's adapter, if not the GPU's usual one.
        """
        away = self.over_network(machine)
        outside = away / ((network or gpu.network) * constants.network)
        inside = (self.sent - away) / (gpu.nvlink * constants.nvlink)
        hops = 1 if self.kind == "exchanged" else self.ranks - 1
        hops *= 2 if self.kind == "reduced" else 1
        slower = "network" if outside > inside else "NVLink"
        return Way(slower, max(inside, outside) + self.calls * hops * constants.hop)


def collectives(
    config: DbrxConfig,
    shape: MeshShape,
    *,
    microbatches: int,
    tokens: int,
    param_dtype: HasItemsize | None = None,
    reduce_dtype: HasItemsize | None = None,
    reshard_after_forward: bool = True,
    activation_checkpointing: str = "none",
) -> list[Collective]:
    """Of a model that ``parallelize`` spread, for a rank's ``tokens`` a microbatch; experts equally loaded.

    Norms of gradients, a few bytes each, are left out.
    """
    parts = Counter(fsdp_units(config, shape, param_dtype, reshard_after_forward, reduce_dtype))
    found: dict[tuple[str, str], Collective] = {}

    def add(kind: str, what: str, sent: float, ranks: int, stride: int, calls: int) -> None:
        before = found.get((kind, what))
        sent, calls = (sent, calls) if before is None else (sent + before.sent, calls + before.calls)
        found[kind, what] = Collective(kind, what, sent, ranks, stride, calls)

    for unit, number in parts.items():
        gathers, scatters = unit.gathers * microbatches * number, microbatches * number
        sent = _ring(unit.padded * unit.itemsize, unit.ranks) * gathers
        add("gathered", unit.what, sent, unit.ranks, unit.stride, gathers)
        sent = _ring(unit.padded * unit.reduced, unit.ranks) * scatters
        add("scattered", unit.what, sent, unit.ranks, unit.stride, scatters)
        sent = 2 * _ring(unit.padded // unit.ranks * unit.reduced, shape.replicate) * number
        add("reduced", unit.what, sent, shape.replicate, shape.shard, number)

    again = activation_checkpointing in ("full", "selective")
    away = (shape.expert - 1) / shape.expert
    # Two ways, forward and backward; to the experts once more if their tokens were not kept. Counts go ahead
    # of them, and a row's weight with it.
    ways, weights, counts = (5 if again else 4), 2, 1
    itemsize = param_dtype.itemsize if param_dtype else FLOAT32
    rows = tokens * config.top_k * (config.d_model * ways + weights) * itemsize * away
    rows += _INT64 * config.num_experts * away * counts
    times = config.n_layers * microbatches
    add("exchanged", "tokens", rows * times, shape.expert, shape.stride[0], (ways + weights + counts) * times)
    return sorted((each for each in found.values() if each.sent), key=lambda each: KINDS.index(each.kind))


def _ring(size: int, ranks: int) -> int:
    return size * (ranks - 1) // ranks
