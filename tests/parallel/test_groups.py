"""The groups of a mesh: as few as a rank is in, each with the run's timeout, at any size."""

from __future__ import annotations

from collections.abc import Iterator
from datetime import timedelta
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch.distributed.tensor import DTensor, Replicate, Shard
from torch.nn.utils import get_total_norm
from torch.testing._internal.distributed.fake_pg import FakeStore

from dbrx_train.checkpoint.tensors import own_share
from dbrx_train.parallel import MeshShape
from dbrx_train.parallel.grad_norm import _offloaded_norm
from dbrx_train.resilience.failure import _poll_seconds

RANKS, RANK = 3072, 1234


@pytest.fixture
def cluster(no_process_group: None) -> Iterator[None]:
    """This process as one rank of 3,072, whose collectives do nothing."""
    dist.init_process_group("fake", store=FakeStore(), rank=RANK, world_size=RANKS)
    yield
    dist.destroy_process_group()


@pytest.mark.usefixtures("cluster")
def test_a_rank_makes_the_groups_that_it_is_in(monkeypatch: pytest.MonkeyPatch) -> None:
    made: list[tuple[int, dict[str, Any]]] = []
    real = dist.new_group

    def spied(ranks: list[int], **options: Any) -> Any:
        made.append((len(ranks), options))
        assert RANK in ranks
        return real(ranks, **options)

    monkeypatch.setattr(dist, "new_group", spied)
    meshes = MeshShape(48, 64, 8).build("cpu", timedelta(seconds=77))
    assert [size for size, _ in made] == [48, 64, 48, 8, 8]
    for _, options in made:
        assert options == {"timeout": timedelta(seconds=77), "use_local_synchronization": True}
    assert meshes.experts is not None
    assert meshes.expert is not None
    assert (meshes.dense.shape, meshes.experts.shape, meshes.expert.size()) == ((48, 64), (48, 8), 8)
    # Rows of 64 neighbours; within one, runs of 8 share the experts.
    assert (*meshes.dense.get_coordinate(), meshes.expert.get_local_rank()) == (19, 18, 2)


@pytest.mark.usefixtures("cluster")
def test_all_ranks_together_are_the_default_group() -> None:
    meshes = MeshShape(1, RANKS, 1).build("cpu", timedelta(seconds=77))
    assert meshes.dense.get_group() is dist.group.WORLD


@pytest.mark.usefixtures("cluster")
def test_replicas_share_what_is_to_be_saved() -> None:
    mesh = MeshShape(48, 64, 1).build("cpu").dense
    local = torch.zeros(2, 4)
    whole = {f"model.{i}": DTensor.from_local(local, mesh, [Replicate(), Shard(0)]) for i in range(96)}
    whole |= {f"optimizer.{i}.step": torch.zeros(()) for i in range(RANKS)}  # the same on all ranks
    own = {f"random.{RANK}": torch.zeros(4)}
    mine = own_share(whole | own)
    names = sorted(whole | own)
    place = RANK // 64  # of this rank's group among the replicas
    expected = [n for i, n in enumerate(names) if n[0] == "m" and i % 48 == place]
    expected += [n for i, n in enumerate(names) if n[0] == "o" and i % RANKS == RANK]
    assert sorted(mine) == sorted([*expected, *own])
    assert len(mine) == 4


def test_the_launchers_store_is_asked_a_thousand_times_a_second_at_most() -> None:
    assert _poll_seconds(8) == 0.5
    for ranks in (512, 3072, 16_384):
        assert ranks / _poll_seconds(ranks) <= 1024


@pytest.mark.usefixtures("no_process_group")
def test_the_norm_of_offloaded_gradients_is_that_of_all() -> None:
    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    try:
        mesh = MeshShape(1, 1, 1).build("cpu").dense
        grads = [torch.randn(6, 4), torch.randn(9)]
        sharded = [DTensor.from_local(g, mesh, [Shard(0)]) for g in grads]
        torch.testing.assert_close(_offloaded_norm(sharded, mesh), get_total_norm(grads))
    finally:
        dist.destroy_process_group()
