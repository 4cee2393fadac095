"""Published mixture-of-experts runs on H100s beside what the plan's step time says of them.

    python scripts/plan_published_moe.py

The publications (docs/data/measured_moe.csv) do not say what a GPU's microbatch was, nor all of the mesh. It
is one sample of 4,096 tokens here, accumulated 8 to 32 times, of which nothing is computed again; experts are
spread over the ranks named below, all else over all ranks, gathered and scattered in bfloat16, or not sent at
all where they are Megatron's.
"""

from __future__ import annotations

import csv
from dataclasses import dataclass
from pathlib import Path

from dbrx_train.plan.collectives import Collective
from dbrx_train.plan.hardware import gpu
from dbrx_train.plan.step_time import Architecture, StepTime, compute, optimizer_seconds

PUBLISHED = Path(__file__).parent.parent / "docs" / "data" / "measured_moe.csv"
SEQ_LEN, MACHINE = 4096, 8


@dataclass(frozen=True)
class Assumed:
    """A model's shape, from its config.json, and what the mesh was or may have been."""

    d_model: int
    layers: int
    query: int
    kv: int
    ffn: int
    experts: int
    top_k: int
    vocabulary: int
    gpus: int
    spread: int
    accumulated: int
    sharded: bool = True
    shared: int = 0


MODELS = {
    "Qwen3-30B-A3B": Assumed(2048, 48, 4096, 512, 768, 128, 8, 151_936, 8, 8, 8),
    "GPT-OSS 120B": Assumed(2880, 36, 4096, 512, 2880, 128, 4, 201_088, 64, 64, 8),
    "Mixtral 8x22B": Assumed(6144, 56, 6144, 1024, 16_384, 8, 2, 32_768, 128, 8, 32, sharded=False),
    "Qwen2-57B-A14B": Assumed(
        3584, 28, 3584, 512, 2560, 64, 8, 151_936, 64, 8, 32, sharded=False, shared=20_480
    ),
    "Mixtral 8x7B": Assumed(4096, 32, 4096, 1024, 14_336, 8, 2, 32_000, 8, 8, 8),
}


def tflops(model: Assumed) -> float:
    """Predicted model TFLOP/s of a GPU: 6 a parameter and token, and causal attention's."""
    card = gpu("h100")
    architecture = Architecture(
        d_model=model.d_model,
        n_layers=model.layers,
        query_width=model.query,
        kv_width=model.kv,
        ffn_hidden_size=model.ffn,
        ffn_matrices=3,
        num_experts=model.experts,
        top_k=model.top_k,
        vocab_size=model.vocabulary,
        stream_bytes=2,
        shared_ffn=model.shared,
    )
    d, layers = model.d_model, model.layers
    expert = 3 * d * model.ffn
    attention = d * (model.query + 2 * model.kv) + model.query * d
    dense = layers * (attention + 3 * d * model.shared) + 2 * model.vocabulary * d
    spread = layers * model.experts * expert // model.spread
    seconds = 0.0
    if model.sharded:
        outer = model.gpus // model.spread
        for size, ranks, stride in ((dense, model.gpus, 1), (spread, outer, model.spread)):
            for kind, times in (("gathered", 2), ("scattered", 1)):
                sent = times * 2 * size * (ranks - 1) / ranks
                each = Collective(kind, "dense", sent, ranks, stride, times * layers)
                seconds += each.way(card, MACHINE).seconds
    rows = 4 * layers * SEQ_LEN * model.top_k * d * 2 * (model.spread - 1) / model.spread
    exchange = Collective("exchanged", "tokens", rows, model.spread, 1, 4 * layers)
    step = StepTime(
        compute=compute(
            architecture,
            card,
            tokens=SEQ_LEN,
            seq_len=SEQ_LEN,
            local_experts=model.experts // model.spread,
        ),
        accumulated=model.accumulated,
        weights=seconds,
        tokens=exchange.way(card, MACHINE).seconds,
        replicas=0.0,
        optimizer=optimizer_seconds((dense + spread * model.spread) / model.gpus, card),
        retries=1.0,
    )
    active = dense + layers * model.top_k * expert - model.vocabulary * d
    flops = 6 * active + 6 * layers * model.query * SEQ_LEN
    return flops * SEQ_LEN * model.accumulated / step.total / 1e12


def published() -> dict[str, float]:
    """TFLOP/s of a GPU by model, of the rows in bfloat16 that say it."""
    with PUBLISHED.open(newline="", encoding="utf-8") as file:
        rows = [row for row in csv.DictReader(file) if row["precision"] == "bf16"]
    return {row["model"]: float(row["tflops_per_gpu"]) for row in rows if row["model"] in MODELS}


def main() -> None:
    for name, measured in published().items():
        predicted = tflops(MODELS[name])
        print(
            f"{name:15} {measured:4.0f} published {predicted:4.0f} predicted {predicted / measured - 1:+.0%}"
        )


if __name__ == "__main__":
    main()
