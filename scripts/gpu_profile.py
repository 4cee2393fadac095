"""Where the time of a step goes on a GPU: python scripts/gpu_profile.py FILE.json

Of dbrx-9b's shape with six layers, 2 x 4,096 tokens of packed documents in bfloat16: kernels by time,
launches, and how often the host waited for the GPU, of one step after four.
"""

from __future__ import annotations

import json
import sys
import time
from pathlib import Path
from typing import Any

import torch
from bench_contestants import our_model
from bench_tasks import CPU_SHAPES, GPU_SHAPES

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
SHAPE = GPU_SHAPES["dbrx-9b, 6 layers"] if DEVICE == "cuda" else CPU_SHAPES["quickstart"]
WAITS = ("cudaStreamSynchronize", "cudaDeviceSynchronize", "cudaEventSynchronize")


def main(target: Path) -> None:
    with torch.device(DEVICE):
        model = our_model(SHAPE.config)
        ids = torch.randint(SHAPE.config.vocab_size, (SHAPE.batch, SHAPE.seq_len))
        starts = torch.arange(0, SHAPE.seq_len, SHAPE.seq_len // 4, dtype=torch.int32).expand(SHAPE.batch, 4)
        documents = (torch.arange(SHAPE.seq_len) // (SHAPE.seq_len // 4)).expand(SHAPE.batch, -1)
    for parameter in model.parameters():
        torch.nn.init.normal_(parameter, std=0.02)
    optimizer = torch.optim.AdamW(model.parameters(), fused=True)

    def step() -> None:
        with torch.autocast(DEVICE, torch.bfloat16):
            loss = model(ids, labels=ids, document_ids=documents, document_starts=starts).loss
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()

    def seconds() -> float:
        begin = time.perf_counter()
        step()
        if DEVICE == "cuda":
            torch.cuda.synchronize()
        return time.perf_counter() - begin

    times = [seconds() for _ in range(4)]
    activities = [torch.profiler.ProfilerActivity.CPU]
    if DEVICE == "cuda":
        activities.append(torch.profiler.ProfilerActivity.CUDA)
    with torch.profiler.profile(activities=activities) as profile:
        step()
        if DEVICE == "cuda":
            torch.cuda.synchronize()
    tokens = SHAPE.batch * SHAPE.seq_len
    flops = tokens * SHAPE.config.flops_per_token(SHAPE.seq_len, causal=True)
    found: dict[str, Any] = {"seconds": times, "flops": flops, "tokens": tokens, "device": DEVICE}
    rows = profile.key_averages()
    on_device = "self_device_time_total" if DEVICE == "cuda" else "self_cpu_time_total"
    rows = sorted(rows, key=lambda row: -getattr(row, on_device))
    found["kernels"] = [[row.key[:90], row.count, getattr(row, on_device)] for row in rows[:40]]
    found["launches"] = sum(
        row.count for row in rows if row.key.startswith(("cudaLaunchKernel", "cuLaunchKernel"))
    )
    found["waits"] = {row.key: row.count for row in rows if row.key in WAITS}
    target.write_text(json.dumps(found, indent=1), encoding="utf-8")


if __name__ == "__main__":
    main(Path(sys.argv[1]))
