"""How many ranks do what: the mesh of a run.

Ranks form ``replicate`` groups that hold the same, each of ``shard`` ranks that divide parameters, gradients
and optimizer state among them (FSDP). With ``replicate`` above 1 this is hybrid sharding (HSDP): gradients
are reduced within a group first, then between groups, so that the long way carries 1/``shard`` of the bytes.

With ``expert`` above 1, so many ranks of a group share the experts of every layer among them, and divide each
one's weights over what is left of the group. Which of these two are neighbours, and so on one machine, is
``innermost``.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from datetime import timedelta
from typing import TYPE_CHECKING, Any

from dbrx_train.model.config import DbrxConfig

if TYPE_CHECKING:
    from torch import Tensor
    from torch.distributed.device_mesh import DeviceMesh

__all__ = ["MeshShape", "Meshes"]


@dataclass(frozen=True)
class MeshShape:
    """Ranks along each axis; ``replicate`` x ``shard`` is the world size, ``expert`` divides ``shard``.

    ``innermost`` says which ranks of a group are neighbours: with ``expert`` those that share experts, and
    tokens travel least far; with ``shard`` those that divide an expert's weights, and these do.
    """

    replicate: int
    shard: int
    expert: int
    innermost: str = "expert"

    @classmethod
    def of(
        cls,
        world_size: int,
        *,
        replicate: int | None = 1,
        shard: int | None = None,
        expert: int = 1,
        innermost: str = "expert",
    ) -> MeshShape:
        """The mesh of ``world_size`` ranks; of ``replicate`` and ``shard``, one that is None takes the rest.

        Raises:
            ValueError: the axes do not fit the world size or each other; names the nearest that do.
        """
        for name, size in (("replicate", replicate), ("shard", shard), ("expert", expert)):
            if size is not None and size < 1:
                raise ValueError(f"{name}: must be at least 1, not {size}")
        if replicate is None and shard is None:
            raise ValueError("replicate: cannot be left open where shard is; use 1")
        if replicate is None:
            replicate = _rest(world_size, "shard", shard)
        if shard is None:
            shard = _rest(world_size, "replicate", replicate)
        if replicate * shard != world_size:
            near = nearest_divisor(world_size, shard)
            raise ValueError(
                f"shard: {replicate} x {shard} ranks (replicate x shard) are not the {world_size} that there "
                f"are; use {world_size // near} x {near}"
            )
        if shard % expert:
            fitting = nearest_divisor(shard, expert)
            raise ValueError(f"expert: {expert} does not divide {shard} ranks of a group; use {fitting}")
        if innermost not in ("expert", "shard"):
            raise ValueError(f"innermost: must be expert or shard, not {innermost!r}")
        return cls(replicate, shard, expert, innermost)

    @property
    def stride(self) -> tuple[int, int]:
        """How far apart neighbours of an ``expert`` and of a ``shard_outer`` group are, in ranks."""
        return (1, self.expert) if self.innermost == "expert" else (self.shard // self.expert, 1)

    def check(self, config: DbrxConfig) -> None:
        """Raise ValueError, with the nearest that fits, unless a model's experts divide over the mesh."""
        if self.expert == 1:
            return
        if config.num_experts % self.expert:
            fitting = nearest_divisor(math.gcd(config.num_experts, self.shard), self.expert)
            raise ValueError(
                f"expert: {self.expert} does not divide {config.num_experts} experts; use {fitting}"
            )
        rows = config.num_experts * config.ffn_hidden_size
        if rows % self.shard:
            fitting = nearest_divisor(math.gcd(rows, self.replicate * self.shard), self.shard)
            raise ValueError(
                f"shard: {self.shard} does not divide the {rows} rows of a layer's experts, which spread "
                f"experts need; use {fitting}"
            )

    def build(self, device_type: str, timeout: timedelta | None = None) -> Meshes:
        """Its DeviceMeshes; torch.distributed must be initialised.

        ``timeout``: after which ranks of a group give up waiting for each other; None: torch's default.
        """
        import torch

        ranks = torch.arange(self.replicate * self.shard)
        replicas = {"replicate": self.replicate} if self.replicate > 1 else {}
        dense = _device_mesh(device_type, ranks.view(*replicas.values(), -1), (*replicas, "shard"), timeout)
        if self.expert == 1:
            return Meshes(dense, None, None)
        names = (*replicas, "shard_outer", "expert")
        # The order of axes is FSDP's, which wants its own first; that of ranks says who are neighbours.
        if self.innermost == "expert":
            ranks = ranks.view(*replicas.values(), -1, self.expert)
        else:
            ranks = ranks.view(*replicas.values(), self.expert, -1).transpose(-1, -2)
        experts = _device_mesh(device_type, ranks, names, timeout)
        return Meshes(dense, experts[names[:-1]], experts["expert"])


@dataclass(frozen=True)
class Meshes:
    """Over what parameters are sharded: ``dense`` ones over (``replicate``,) ``shard``; those of experts over
    ``expert`` first, and then over what is left, ``experts``: (``replicate``,) ``shard_outer``."""

    dense: DeviceMesh
    experts: DeviceMesh | None
    expert: DeviceMesh | None


def _rest(world_size: int, name: str, size: int | None) -> int:
    assert size is not None
    if world_size % size:
        fitting = nearest_divisor(world_size, size)
        raise ValueError(f"{name}: {size} does not divide {world_size} ranks; use {fitting}")
    return world_size // size


def nearest_divisor(number: int, wanted: int) -> int:
    """The divisor of ``number`` that is nearest to ``wanted``, by ratio."""
    divisors = [d for d in range(1, number + 1) if number % d == 0]
    return min(divisors, key=lambda d: max(d, wanted) / min(d, wanted))


def _device_mesh(
    device_type: str, ranks: Tensor, names: tuple[str, ...], timeout: timedelta | None
) -> DeviceMesh:
    """The mesh of ``ranks``, which are all there are, laid out along axes of ``names``.

    ``init_device_mesh`` of torch 2.7 gives its groups a timeout of its own, and has every rank take part in
    making every group of the world. Here a rank makes those that it is in: all ranks by the same order of
    axes, so none waits for another that waits for it.
    """
    import torch.distributed as dist
    from torch.distributed.device_mesh import DeviceMesh

    (place,) = (ranks == dist.get_rank()).nonzero().tolist()
    groups: list[Any] = []
    for axis in range(ranks.ndim):
        line = ranks[tuple(slice(None) if i == axis else at for i, at in enumerate(place))].tolist()
        if len(line) == dist.get_world_size():
            groups.append(dist.group.WORLD)
        else:
            groups.append(dist.new_group(line, timeout=timeout, use_local_synchronization=True))
    if len(names) == 1:
        return DeviceMesh.from_group(groups[0], device_type, mesh_dim_names=names)
    return DeviceMesh.from_group(groups, device_type, ranks.contiguous(), mesh_dim_names=names)
