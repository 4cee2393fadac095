"""On every mesh the same losses, the same gradients, the same weights as in one process."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import pytest
import torch
from paths import HELPERS
from ranks import torchrun
from warm import Warm

from dbrx_train.model.config import DbrxConfig
from dbrx_train.model.decoder import Dbrx
from dbrx_train.parallel import MeshShape, parallelize

NEEDS_CUDA = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA GPU")
PROGRAM = str(HELPERS / "parallel_ranks.py")


@pytest.mark.slow
@pytest.mark.parametrize(
    ("ranks", "meshes"),
    [
        (1, [[1, 1, 1, "expert"]]),
        pytest.param(1, [[1, 1, 1, "expert"]], marks=[pytest.mark.gpu, NEEDS_CUDA]),
        (2, [[1, 2, 1, "expert"], [2, 1, 1, "expert"], [1, 2, 2, "shard"]]),
        (
            4,
            [
                [1, 4, 1, "expert"],
                [2, 2, 1, "expert"],
                [1, 4, 4, "expert"],
                [1, 4, 2, "expert"],
                [2, 2, 2, "expert"],
                [1, 4, 2, "shard"],
            ],
        ),
    ],
    ids=["1", "cuda", "2", "4"],
)
def test_every_gradient_on_every_mesh(
    ranks: int, meshes: list[list[Any]], request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch
) -> None:
    if request.node.get_closest_marker("gpu"):
        monkeypatch.setenv("DEVICE", "cuda")
        launch = torchrun
    else:
        launch = request.getfixturevalue("warm").torchrun
    results: list[dict[str, Any]] = json.loads(launch(ranks, PROGRAM, json.dumps(meshes)))
    kinds = len(results) // len(meshes)
    assert [found["kind"] for found in results] == ["adamw", "lionw", "bfloat16", "balance"] * len(meshes)
    for i, found in enumerate(results):
        (replicate, shard, *_), kind = meshes[i // kinds], found["kind"]
        assert found["initial"] == 0, "weights are drawn alike, bit for bit"
        if kind == "bfloat16":
            assert max(found["gradients"].values()) < 0.02, found["gradients"]
            # A GPU's kernels for bfloat16 go by the number of rows, which sharding divides.
            assert found["loss 0"] < (1e-3 if request.node.get_closest_marker("gpu") else 1e-6)
            continue
        assert max(found["gradients"].values()) < 1e-5, found["gradients"]
        assert found["unvisited"] > 0
        # Where a gradient is near 0, Lion's steps are whole ones up or down.
        loose = 1e-3 if kind == "lionw" else 1e-5
        for key in (key for key in found if key.startswith(("loss", "norm", "weights"))):
            assert found[key] < (1e-5 if key.endswith("0") else loose), (key, found)
        assert found["share"] == pytest.approx(1 / shard, rel=0.1), replicate


@pytest.mark.slow
def test_a_step_sends_the_bytes_that_the_formulas_say(warm: Warm) -> None:
    cases = [
        [1, 4, 1, "none", True, False, "expert", "float32"],
        [1, 4, 1, "none", False, True, "expert", "float32"],
        [2, 2, 1, "full", True, True, "expert", "bfloat16"],
        [1, 4, 4, "none", True, False, "expert", "float32"],
        [1, 4, 2, "full", True, True, "expert", "float32"],
        [2, 2, 2, "selective", False, True, "expert", "float32"],
        [1, 4, 2, "norm_attn_norm", True, True, "shard", "bfloat16"],
        [1, 4, 4, "full_keep_dispatched", True, True, "expert", "float32"],
    ]
    program = str(HELPERS / "traffic_ranks.py")
    results = json.loads(warm.torchrun(4, program, json.dumps(cases)))
    for case, (counted, computed) in zip(cases, results, strict=True):
        assert counted == computed, case


AVERAGE = """
import os, torch, torch.distributed as dist
dist.init_process_group("gloo")
out = torch.zeros(1)
dist.reduce_scatter_tensor(out, torch.ones(2), op=dist.ReduceOp.AVG)
if dist.get_rank() == 0:
    print(out.item(), flush=True)
dist.barrier()
os._exit(0)
"""


@pytest.mark.slow
def test_gloo_still_needs_what_we_mend(tmp_path: Path, warm: Warm) -> None:
    """If this fails, parallel/gloo.py mends what is no longer broken, or leaves broken what now is."""
    (tmp_path / "average.py").write_text(AVERAGE)
    broken = tuple(map(int, torch.__version__.split(".")[:2])) <= (2, 7)
    assert float(warm.torchrun(2, str(tmp_path / "average.py"))) == (2.0 if broken else 1.0)


@pytest.mark.parametrize(
    ("world", "axes", "expected"),
    [
        (1, {}, (1, 1)),
        (8, {}, (1, 8)),
        (8, {"replicate": 2}, (2, 4)),
        (6, {"replicate": 3, "shard": 2}, (3, 2)),
    ],
)
def test_the_mesh_covers_all_ranks(world: int, axes: dict[str, int], expected: tuple[int, int]) -> None:
    shape = MeshShape.of(world, **axes)
    assert (shape.replicate, shape.shard) == expected


@pytest.mark.parametrize(
    ("world", "axes", "says"),
    [
        (8, {"replicate": 3}, "replicate: 3 does not divide 8 ranks; use 4"),
        (8, {"replicate": 0}, "replicate: must be at least 1, not 0"),
        (8, {"expert": 3}, "expert: 3 does not divide 8 ranks of a group; use 4"),
        (8, {"shard": 3}, "shard: 1 x 3 ranks (replicate x shard) are not the 8 that there are; use 2 x 4"),
        (
            8,
            {"replicate": 2, "shard": 8},
            "2 x 8 ranks (replicate x shard) are not the 8 that there are; use 1 x 8",
        ),
    ],
)
def test_impossible_meshes_are_refused_with_the_nearest(world: int, axes: dict[str, int], says: str) -> None:
    with pytest.raises(ValueError, match=re.escape(says)):
        MeshShape.of(world, **axes)


def test_a_model_that_does_not_fit_a_mesh_is_refused() -> None:
    config = DbrxConfig(d_model=16, n_layers=1, n_heads=2, n_kv_heads=1, ffn_hidden_size=28, num_experts=12)
    with pytest.raises(ValueError, match="expert: 8 does not divide 12 experts; use 4"):
        MeshShape.of(8, expert=8).check(config)
    with pytest.raises(
        ValueError, match=r"shard: 32 does not divide the 336 rows of a layer's experts, .* use 16"
    ):
        MeshShape.of(32, expert=2).check(config)
    MeshShape.of(32).check(config)
    with pytest.raises(
        ValueError, match=r"model: has weights, which would be lost; make it under torch.device"
    ):
        parallelize(Dbrx(config), MeshShape.of(1), device_type="cpu", seed=0)
