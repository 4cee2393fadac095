"""The Trainer's loss curve is the same on every mesh."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from paths import HELPERS
from tiny_run import run_yaml, saved_tensors
from warm import Warm

PROGRAM = str(HELPERS / "recorded_run.py")
STEPS = 20
MESHES = {
    1: [(1, 1)],
    2: [(1, 1), (2, 1), (1, 2)],
    4: [(1, 1), (2, 1), (1, 4), (1, 2), (2, 2)],
}


@pytest.mark.slow
def test_twenty_steps_on_every_mesh(workplace: Path, tmp_path: Path, warm: Warm) -> None:
    path = run_yaml(workplace, tmp_path, "curve")
    options = [f"max_duration={STEPS}ba", "optimization.global_batch_size=8", "evaluation.max_samples=0"]
    options += ["checkpoints.interval=1dur", "optimization.optimizer.lr=3e-3"]
    # Where a gradient is all but 0, AdamW turns rounding into whole steps; its epsilon tempers them.
    options += ["optimization.optimizer.eps=1e-4"]
    curves: dict[str, list[float]] = {}
    for ranks, meshes in MESHES.items():
        jobs = [
            {
                "name": f"{ranks} ranks, {replicate} x {ranks // replicate}, experts over {expert}",
                "resume": None,
                "options": [*options, f"parallelism.replicate={replicate}", f"parallelism.expert={expert}"],
            }
            for replicate, expert in meshes
        ]
        warm.torchrun(ranks, PROGRAM, str(path), str(tmp_path), json.dumps(jobs))
        for name in (str(job["name"]) for job in jobs):
            losses = json.loads((tmp_path / f"{name}.0.json").read_text())["losses"]
            curves[name] = [losses[str(step)] for step in range(STEPS)]
    first, *others = curves
    assert curves[first][-1] < curves[first][0] - 0.5
    for name in others:
        assert curves[name] == pytest.approx(curves[first], rel=1e-5), name


@pytest.mark.slow
def test_a_load_that_is_evened_out_over_the_batch_is_that_of_one_process(
    workplace: Path, tmp_path: Path, warm: Warm
) -> None:
    """With what else a mesh may be given: offloading, recomputation, gathered parameters that are kept."""
    path = run_yaml(workplace, tmp_path, "balance")
    options = ["max_duration=6ba", "optimization.microbatch_size=null", "optimization.optimizer.eps=1e-4"]
    options += [
        "evaluation.max_samples=0",
        "checkpoints.interval=1dur",
        "optimization.balance_over=global_batch",
    ]
    # So that equally many tokens count on every rank
    options += [
        "model.mask_documents=false",
        "model.balance_loss_weight=0.5",
        "model.loss_free_bias_rate=0.01",
    ]
    spread = ["parallelism.replicate=2", "parallelism.expert=2", "parallelism.cpu_offload=true"]
    spread += [
        "parallelism.activation_checkpointing=norm_attn_norm",
        "parallelism.reshard_after_forward=false",
    ]
    for ranks, mesh in ((1, []), (4, spread)):
        job = {"name": f"on{ranks}", "resume": None, "options": [*options, *mesh]}
        warm.torchrun(ranks, PROGRAM, str(path), str(tmp_path), json.dumps([job]))
    one, four = (json.loads((tmp_path / f"on{n}.0.json").read_text())["losses"] for n in (1, 4))
    assert list(four.values()) == pytest.approx(list(one.values()), rel=1e-5)
    weights, spread_weights = (saved_tensors(tmp_path / f"on{n}" / "checkpoints" / "ba6") for n in (1, 4))
    biases = [name for name in weights if name.endswith("expert_bias")]
    assert len(biases) == 2
    for name in biases:
        assert weights[name].any()
        assert torch.equal(weights[name], spread_weights[name])
