"""Weight initialisation that does not depend on device, sharding or order of construction.

Every parameter is drawn in blocks of rows, each block by a generator seeded from (seed, name, block), on
the CPU. A shard therefore draws only the blocks it overlaps, and gets what the whole model would have.
"""

from __future__ import annotations

import hashlib
import math

import torch
from torch import Tensor, nn

from dbrx_train.model.config import DbrxConfig

ROWS_PER_BLOCK = 256


@torch.no_grad()
def init_weights(module: nn.Module, config: DbrxConfig, seed: int) -> None:
    """Draw every parameter of `module` (a Dbrx or a part of it) and reset its buffers."""
    for name, parameter in module.named_parameters():
        if is_norm(name):
            parameter.fill_(1.0)
        else:
            rows, width = parameter.shape
            for start in range(0, rows, ROWS_PER_BLOCK):
                stop = min(start + ROWS_PER_BLOCK, rows)
                parameter[start:stop] = draw_rows(name, config, seed, (rows, width), start, stop)
    for buffer in module.buffers():  # the routers' selection biases
        buffer.zero_()


def is_norm(name: str) -> bool:
    """True for the weight of a norm, by its parameter name."""
    return name.split(".")[-2:-1] in (["norm_1"], ["norm_2"], ["norm_f"])


def draw_rows(
    name: str, config: DbrxConfig, seed: int, shape: tuple[int, int], start: int, stop: int
) -> Tensor:
    """Rows [start, stop) of the matrix `name`, whose whole shape is `shape`; float32, on the CPU."""
    rows, width = shape
    std = weight_std(name, config, width)
    blocks = []
    for first in range(start - start % ROWS_PER_BLOCK, stop, ROWS_PER_BLOCK):
        last = min(first + ROWS_PER_BLOCK, rows)
        digest = hashlib.sha256(f"{seed}/{name}/{first // ROWS_PER_BLOCK}".encode()).digest()
        generator = torch.Generator("cpu").manual_seed(int.from_bytes(digest[:7], "big"))
        block = torch.empty(last - first, width, dtype=torch.float32, device="cpu")
        if config.init_method == "trunc_normal":
            nn.init.trunc_normal_(block, std=std, a=-3 * std, b=3 * std, generator=generator)
        else:
            block.normal_(std=std, generator=generator)
        blocks.append(block[max(start - first, 0) : stop - first])
    return torch.cat(blocks)


def weight_std(name: str, config: DbrxConfig, width: int) -> float:
    """Standard deviation of the matrix `name`.

    kaiming_normal is sqrt(2 / fan_in) (arXiv 1502.01852, as LLM Foundry uses it); w2 is stored input by
    output, so its fan-in is ffn_hidden_size. Residual scaling is that of GPT-2.
    """
    is_w2 = name.endswith("w2")
    std = config.init_std
    if config.init_method == "kaiming_normal":
        std = math.sqrt(2 / (config.ffn_hidden_size if is_w2 else width))
    if config.init_residual_scaling and (is_w2 or name.endswith("out_proj.weight")):
        std /= math.sqrt(2 * config.n_layers)
    return std
