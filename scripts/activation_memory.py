"""Peak GPU memory of a step of dbrx-9b's layers, for each choice of activation checkpointing.

As many of its 24 layers as leave room on 80 GB for weights, gradients and AdamW's state. Prints a line
for each choice: what the step needs beside them, the estimate of plan/memory.py, ms a step.
"""

from __future__ import annotations

import time
from dataclasses import replace
from pathlib import Path

import torch

from dbrx_train.config import load
from dbrx_train.model.config import ACTIVATION_CHECKPOINTING
from dbrx_train.model.decoder import Dbrx
from dbrx_train.parallel import MeshShape, checkpoint_activations
from dbrx_train.plan.memory import memory

LAYERS, TOKENS, STEPS = 8, 4096, 5


def main() -> None:
    path = Path(__file__).parent.parent / "configs" / "pretrain" / "dbrx-9b.yaml"
    config = replace(load(path).model, n_layers=LAYERS)
    ids = torch.randint(config.vocab_size, (1, TOKENS), device="cuda")
    documents = {"document_ids": torch.zeros_like(ids)}
    documents["document_starts"] = torch.zeros(1, 1, dtype=torch.int32, device="cuda")
    for what in ACTIVATION_CHECKPOINTING:
        with torch.device("meta"):
            model = Dbrx(config)
        checkpoint_activations(model, what)
        model.to_empty(device="cuda")
        for parameter in model.parameters():
            torch.nn.init.normal_(parameter, std=0.02)
        optimizer = torch.optim.AdamW(model.parameters(), fused=True)
        for step in range(STEPS):
            if step == STEPS - 1:
                torch.cuda.reset_peak_memory_stats()
                resting, begin = torch.cuda.memory_allocated(), time.perf_counter()
            with torch.autocast("cuda", torch.bfloat16):
                loss = model(ids, labels=ids, **documents).loss
            assert loss is not None
            loss.backward()
            optimizer.step()
            optimizer.zero_grad()
            torch.cuda.synchronize()
        peak, seconds = torch.cuda.max_memory_allocated() - resting, time.perf_counter() - begin
        estimate = memory(
            config,
            MeshShape.of(1),
            tokens=TOKENS,
            param_dtype=torch.bfloat16,
            activation_checkpointing=what,
        ).activations
        gradients = sum(p.numel() * p.element_size() for p in model.parameters())
        print(
            f"{what:15} {LAYERS} layers, {TOKENS} tokens: {(peak - gradients) / 1e9:6.2f} GB, "
            f"activations estimated at {estimate / 1e9:6.2f} GB, {seconds * 1e3:7.1f} ms a step"
        )
        del model, optimizer, loss
        torch.cuda.empty_cache()


if __name__ == "__main__":
    main()
