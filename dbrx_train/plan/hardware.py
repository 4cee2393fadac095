"""GPUs, and the links between them, as a plan sees them.

Peaks, sizes and bandwidths are those of NVIDIA's data sheets. What of them is attained is measured: shares of
an A100 and an H100 are fitted to published runs (docs/planning.md, ``scripts/plan_calibration.py``); H200 and
B200 are taken to attain the H100's shares.
"""

from __future__ import annotations

import difflib
from dataclasses import dataclass, replace

__all__ = ["ALIASES", "GPU", "GPUS", "gpu"]


@dataclass(frozen=True)
class GPU:
    """A kind of GPU in machines of eight with NVLink, one network adapter each."""

    name: str
    torch_name: str
    """What ``torch.cuda.get_device_name`` has in it."""
    peak: float
    """FLOP/s, dense bfloat16."""
    peak_float32: float
    """FLOP/s without TF32, which torch leaves off."""
    memory: float
    """Bytes."""
    memory_bandwidth: float
    """Bytes/s."""
    nvlink: float
    """Bytes/s in one direction."""
    network: float
    """Bytes/s of its adapter, as sold."""
    watts: float
    """Of its share of a machine under load."""
    hour_price: float | None
    """Dollars an hour, where a dated price is at hand."""
    products: float
    """Share of ``peak`` that large matrix products attain."""
    attention: float
    """Share of ``peak`` that causal attention attains with today's kernels."""
    attention_2023: float
    """The same with the kernels of the published runs (Triton's FlashAttention)."""


# An H100's machine takes 7.75 kW under load, 0.76 of its data sheet's most; others that share of theirs.
# The H100's price is that of a reserved hour in 2026-03 ($2.95 on demand in 2026-05).
_H100 = GPU(
    name="h100",
    torch_name="H100 80GB HBM3",
    peak=989.5e12,
    peak_float32=67e12,
    memory=80 * 2**30,
    memory_bandwidth=3.35e12,
    nvlink=450e9,
    network=50e9,
    watts=969,
    hour_price=2.35,
    products=0.771,
    attention=0.45,
    attention_2023=0.181,
)
_A100 = GPU(
    name="a100-80gb",
    torch_name="A100-SXM4-80GB",
    peak=312e12,
    peak_float32=19.5e12,
    memory=80 * 2**30,
    memory_bandwidth=2.04e12,
    nvlink=300e9,
    network=25e9,
    watts=618,
    hour_price=None,
    products=0.86,
    attention=0.5,
    attention_2023=0.323,
)
_OTHERS = (
    replace(_H100, name="h200", torch_name="H200", memory=141e9, memory_bandwidth=4.8e12, hour_price=None),
    replace(
        _H100,
        name="b200",
        torch_name="B200",
        peak=2250e12,
        peak_float32=75e12,
        memory=180e9,
        memory_bandwidth=7.7e12,
        nvlink=900e9,
        watts=1360,
        hour_price=None,
    ),
    _A100,
    replace(
        _A100,
        name="a100-40gb",
        torch_name="A100-SXM4-40GB",
        memory=40 * 2**30,
        memory_bandwidth=1.555e12,
    ),
)
GPUS = {each.name: each for each in (_H100, *_OTHERS)}
ALIASES = {"h100-80gb": "h100", "a100": "a100-80gb"}


def gpu(name: str) -> GPU:
    """The GPU of that name, in any case; ValueError for one that is not known, with the nearest."""
    key = name.lower()
    key = ALIASES.get(key, key)
    if key not in GPUS:
        near = difflib.get_close_matches(key, [*GPUS, *ALIASES], n=1, cutoff=0.0)
        raise ValueError(f"{name!r} is not known; did you mean {near[0]}? known: {', '.join(GPUS)}")
    return GPUS[key]


def recognised(device: str) -> GPU | None:
    """The GPU that torch calls ``device``, if it is known."""
    return next((each for each in GPUS.values() if each.torch_name in device), None)
