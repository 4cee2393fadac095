"""Weights in float8 with scales, as DeepSeek, vLLM's compressed-tensors and others write them."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any

import torch
from torch import Tensor

__all__ = ["block_of", "check_method", "dequantize", "is_of_activations", "scales_of"]

_SCALES = ("_scale_inv", "_scale")
"""What follows a weight's name in that of its scales, which both are multiplied by."""
_UNUSED = (".input_scale", ".output_scale", ".k_scale", ".v_scale")
"""Scales of activations."""
_METHODS = ("fp8", "compressed-tensors", "fbgemm_fp8")
_BLOCK = (128, 128)


def check_method(hf: Mapping[str, Any]) -> None:
    """Raise ValueError if a config.json's weights are quantized in another way than into float8."""
    quantization = hf.get("quantization_config")
    if not isinstance(quantization, Mapping):
        return
    method = quantization.get("quant_method")
    if method not in _METHODS:
        raise ValueError(
            f"quantization_config.quant_method: {method!r} is not read; write the weights in bfloat16 first, "
            f"as `dequantize` and `save_pretrained` of a model in transformers do"
        )


def block_of(hf: Mapping[str, Any]) -> tuple[int, int]:
    """Rows and columns that share a scale, where scales are a matrix of blocks."""
    quantization = hf.get("quantization_config")
    found = quantization.get("weight_block_size") if isinstance(quantization, Mapping) else None
    return (int(found[0]), int(found[1])) if isinstance(found, list) and len(found) == 2 else _BLOCK


def scales_of(names: Iterable[str], dtypes: Mapping[str, torch.dtype]) -> dict[str, str]:
    """The scales of each of the weights ``names`` that is in float8 and has some."""
    eight = {name for name in names if dtypes.get(name) == torch.float8_e4m3fn}
    return {name: f"{name}{end}" for name in eight for end in _SCALES if f"{name}{end}" in dtypes}


def is_of_activations(name: str) -> bool:
    """Whether a tensor is none of the weights', but scales what passes between them."""
    return name.endswith(_UNUSED)


def dequantize(
    weight: Tensor, scale: Tensor, rows: slice, columns: slice, block: tuple[int, int] = _BLOCK
) -> Tensor:
    """Part of a weight [N, M] in float32: each value times its scale.

    scale: one for all, [N] or [N, 1] for rows, or [ceil(N / block), ceil(M / block)].

    >>> weight = torch.ones(4, 6).to(torch.float8_e4m3fn)
    >>> scale = torch.tensor([[1.0, 2.0], [3.0, 4.0]])
    >>> dequantize(weight, scale, slice(1, 3), slice(2, 4), block=(2, 3))
    tensor([[1., 2.],
            [3., 4.]])
    """
    values = weight[rows, columns].float()
    if scale.numel() == 1:
        return values * scale.float().reshape(())
    scale = scale[:, None] if scale.ndim == 1 else scale
    picked = scale.float()
    for axis, part in enumerate((rows, columns)):
        size, count = weight.shape[axis], scale.shape[axis]
        shared = size if count == 1 else 1 if count == size else block[axis]
        picked = picked.index_select(axis, torch.arange(part.start, part.stop) // shared)
    return values * picked
