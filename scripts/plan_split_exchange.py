"""Whether it would pay to split the exchange of tokens: python scripts/plan_split_exchange.py

A microbatch's tokens would go to their experts in two halves, the exchange of one behind the experts'
products of the other. It is not built; this says what the plan would say of it, on the quickest meshes with
it and without. Halves read the experts' weights twice, and their gradients are added up. At best half of the
exchange is hidden, for nothing runs beside the first half on its way there and the last on its way back.
`free` is the bound for whatever may be built, such as halves of a batch behind each other's attention: all is
hidden that fits beside computing, and nothing is computed more.
"""

from __future__ import annotations

import math
import warnings
from contextlib import suppress
from dataclasses import replace
from pathlib import Path

from dbrx_train.config import ConfigError, RunConfig, load
from dbrx_train.plan.hardware import GPU
from dbrx_train.plan.planner import Plan, plan
from dbrx_train.plan.search import search
from dbrx_train.plan.step_time import CALIBRATED

FOLDER = Path(__file__).parent.parent / "configs" / "pretrain"
CLUSTERS = (("dbrx-132b", 64), ("dbrx-132b", 512), ("dbrx-132b", 3072), ("dbrx-132b-32k", 512))
OVERLAPS = (CALIBRATED.overlap, 1.25, math.inf)
"""The fitted one; that of an earlier fit to other rows; all is hidden that can be."""
MOST = 60e9
"""Bytes that a rank of a mesh may hold, unless it is the one that is configured."""
HOW = ("whole", "halves", "free")
LAUNCHES, LAUNCH = 40, 5e-6
"""Kernels more, of a layer and microbatch in both directions, and seconds of one."""


def more_computing(config: RunConfig, gpu: GPU, expert: int) -> float:
    """Seconds more of a microbatch: of its layers, by half as many rows at a time."""
    model = config.model
    weights = 3 * 2 * model.d_model * model.ffn_hidden_size * (model.num_experts // expert)
    again = config.parallelism.activation_checkpointing in ("full", "full_keep_dispatched")
    # Read once more forward, once backward, and two thirds if computed again; of gradients two are written
    # instead of one, both read, and their sum written.
    moved = weights * (2 + again * 2 / 3 + 4)
    return model.n_layers * (moved / (gpu.memory_bandwidth * CALIBRATED.memory) + LAUNCHES * LAUNCH)


def seconds(found: Plan, overlap: float, how: str) -> float:
    """Of a step, its exchange ``whole``, in ``halves`` or hidden ``free`` of charge."""
    step = replace(found.step, constants=replace(CALIBRATED, overlap=overlap))
    if how == "whole" or not step.tokens:
        return step.total
    products, more = step.compute.expert_products, 0.0
    hidden = min(step.tokens, step.compute.total)
    if how == "halves":
        hidden = min(step.tokens / 2, products)
        more = more_computing(found.config, found.gpu, found.shape.expert)
    return replace(
        step,
        compute=replace(step.compute, expert_products=products + more),
        weights=step.weights + hidden,
        tokens=step.tokens - hidden,
    ).total


def main() -> None:
    warnings.simplefilter("ignore")
    for name, gpus in CLUSTERS:
        config = load(FOLDER / f"{name}.yaml")
        plans = [each for each in search(config, gpus) if each.held.total <= MOST]
        with suppress(ConfigError):  # it may not divide over so many
            plans.append(plan(config, gpus))
        print(f"{name} on {gpus} GPUs")
        for overlap in OVERLAPS:
            best = {how: min(seconds(each, overlap, how) for each in plans) for how in HOW}
            told = ", ".join(f"{how} {best[how]:.3f} s ({best[how] / best['whole'] - 1:+.1%})" for how in HOW)
            print(f"  overlap {overlap:4}: {told}")


if __name__ == "__main__":
    main()
