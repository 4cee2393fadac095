"""How many ranks do what: the mesh of a run.

Ranks form ``replicate`` groups that hold the same, each of ``shard`` ranks that divide parameters, gradients
and optimizer state among them (FSDP). With ``replicate`` above 1 this is hybrid sharding (HSDP): gradients
are reduced within a group first, then between groups, so that the long way carries 1/``shard`` of the bytes.

With ``expert`` above 1, runs of that many ranks within a group share the experts of every layer among them,
and divide each one's weights over what is left of the group.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

from torch.distributed.device_mesh import DeviceMesh, init_device_mesh

__all__ = ["MeshShape"]


@dataclass(frozen=True)
class MeshShape:
    """Ranks along each axis; ``replicate`` x ``shard`` is the world size, ``expert`` divides ``shard``."""

    replicate: int
    shard: int
    expert: int

    @classmethod
    def of(
        cls,
        world_size: int,
        *,
        replicate: int = 1,
        shard: int | None = None,
        expert: int = 1,
        num_experts: int | None = None,
    ) -> MeshShape:
        """The mesh of ``world_size`` ranks; ``shard`` None takes what ``replicate`` leaves.

        Raises:
            ValueError: the axes do not fit the world size, each other or the model's number of experts;
                names the nearest that do.
        """
        for name, size in (("replicate", replicate), ("shard", shard), ("expert", expert)):
            if size is not None and size < 1:
                raise ValueError(f"{name}: must be at least 1, not {size}")
        if shard is None:
            if world_size % replicate:
                fitting = nearest_divisor(world_size, replicate)
                raise ValueError(f"replicate: {replicate} does not divide {world_size} ranks; use {fitting}")
            shard = world_size // replicate
        if replicate * shard != world_size:
            near = nearest_divisor(world_size, shard)
            raise ValueError(
                f"shard: {replicate} x {shard} ranks (replicate x shard) are not the {world_size} that there "
                f"are; use {world_size // near} x {near}"
            )
        whole = math.gcd(shard, num_experts or shard)
        if whole % expert:
            held = f"{shard} ranks of a group" + (f" and {num_experts} experts" if num_experts else "")
            raise ValueError(f"expert: {expert} does not divide {held}; use {nearest_divisor(whole, expert)}")
        return cls(replicate, shard, expert)

    def build(self, device_type: str) -> DeviceMesh:
        """The DeviceMesh, with axes ``replicate``, ``shard_outer`` and ``expert``, the last two of which are
        ``shard`` together. torch.distributed must be initialised."""
        mesh = init_device_mesh(
            device_type,
            (self.replicate, self.shard // self.expert, self.expert),
            mesh_dim_names=("replicate", "shard_outer", "expert"),
        )
        mesh["shard_outer", "expert"]._flatten("shard")
        return mesh


def nearest_divisor(number: int, wanted: int) -> int:
    """The divisor of ``number`` that is nearest to ``wanted``, by ratio."""
    divisors = [d for d in range(1, number + 1) if number % d == 0]
    return min(divisors, key=lambda d: max(d, wanted) / min(d, wanted))
