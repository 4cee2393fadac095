"""Writes the table of meshes in docs/parallelism.md: python scripts/parallelism_docs.py"""

from __future__ import annotations

from pathlib import Path

import torch

from dbrx_train.config import RunConfig, load
from dbrx_train.parallel import MeshShape
from dbrx_train.plan.estimates import memory, traffic

ROOT = Path(__file__).parent.parent
TARGET = ROOT / "docs" / "parallelism.md"
BEGIN, END = "<!-- scripts/parallelism_docs.py -->\n", "<!-- end -->\n"
NAMES = ["dbrx-9b", "moe-a", "dense-a", "dbrx-18b", "moe-b", "dbrx-35b", "dbrx-73b", "dbrx-132b"]
NAMES += ["dbrx-132b-32k"]
CLUSTERS = (8, 64, 512, 3072)
COLUMNS = ["configuration", "GPUs", "mesh", "held: shards", "gathered", "activations", "all"]
COLUMNS += ["sent: gathered", "scattered", "between replicas", "tokens"]
GPU_GB = 80


def row(config: RunConfig, gpus: int) -> str | None:
    """A line of the table; None where the configuration does not run on so many GPUs."""
    parallelism, batch = config.parallelism, config.optimization.global_batch_size
    try:
        shape = MeshShape.of(gpus, replicate=None, shard=int(parallelism.shard), expert=parallelism.expert)
        shape.check(config.model)
    except ValueError:
        return None
    if batch % gpus:
        return None
    micro = config.optimization.microbatch_size or batch // gpus
    common = {
        "tokens": micro * config.data.seq_len,
        "param_dtype": torch.bfloat16,
        "activation_checkpointing": parallelism.activation_checkpointing,
    }
    microbatches = batch // gpus // micro
    held = memory(config.model, shape, accumulates=microbatches > 1, **common)
    sent = traffic(config.model, shape, microbatches=microbatches, **common)
    assert held.total < GPU_GB * 1e9, (config.run_name, gpus)
    mesh = f"{shape.replicate} x {shape.shard}"
    if shape.expert > 1:
        mesh += f", experts over {shape.expert}"
    sizes = (held.shards, held.gathered, held.activations, held.total)
    sizes += (sent.gathered, sent.scattered, sent.reduced, round(sent.exchanged))
    return _line([config.run_name, str(gpus), mesh, *(f"{n / 1e9:,.1f}" for n in sizes)])


def _line(cells: list[str]) -> str:
    return f"| {' | '.join(cells)} |\n"


def render() -> str:
    rows = []
    for name in NAMES:
        config = load(ROOT / "configs" / "pretrain" / f"{name}.yaml")
        rows += [line for gpus in CLUSTERS if (line := row(config, gpus)) is not None]
    return _line(COLUMNS) + _line(["---"] * len(COLUMNS)) + "".join(rows)


def renewed() -> str:
    """The page with its table as it should be."""
    before, rest = TARGET.read_text(encoding="utf-8").split(BEGIN)
    return before + BEGIN + render() + END + rest.split(END)[1]


if __name__ == "__main__":
    TARGET.write_text(renewed(), encoding="utf-8")
