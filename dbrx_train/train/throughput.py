"""The FLOP/s that utilisation is relative to."""

from __future__ import annotations

import time

import torch

from dbrx_train.plan.hardware import GPUS

# Which data sheet's peak is that of a device, by what torch calls it.
_PUBLISHED = {"H200": "h200", "H100 80GB HBM3": "h100", "A100": "a100-80gb", "B200": "b200"}


def peak_flops(device: str, precision: str, given: float | None) -> tuple[float, str]:
    """FLOP/s of one device in the run's precision, and where the figure is from.

    The ``given`` one, if any; else a GPU's is its data sheet's where we know it. Otherwise, and on a CPU, it
    is that of a measured matrix product.
    """
    if given is not None:
        return given, "from logging.peak_flops"
    if device == "gpu" and precision == "amp_bf16":
        name = torch.cuda.get_device_name()
        for known, sheet in _PUBLISHED.items():
            if known in name:
                return GPUS[sheet].peak, f"{known} data sheet, dense bf16"
    return _measure(device, precision), "measured 2048x2048 matrix product"


def _measure(device: str, precision: str) -> float:
    n = 2048
    dtype = torch.bfloat16 if precision == "amp_bf16" else torch.float32
    a = torch.randn(n, n, dtype=dtype, device="cuda" if device == "gpu" else "cpu")
    best = float("inf")
    for _ in range(4):
        start = time.perf_counter()
        product = a @ a
        product[0, 0].item()  # waits for a GPU
        best = min(best, time.perf_counter() - start)
    return 2 * n**3 / best
