"""Moments in bfloat16 are right on average, and cost little accuracy."""

from __future__ import annotations

import torch
from torch import Tensor

from dbrx_train.train.bfloat16_adamw import BFloat16AdamW, round_stochastically


def test_rounding_gives_a_neighbour_and_the_value_on_average() -> None:
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(50, generator=generator) * 10.0 ** torch.arange(-25, 25).div(2)
    drawn = torch.stack([round_stochastically(x, generator).double() for _ in range(5_000)])
    below = x.view(torch.int32).bitwise_and(-1 << 16).view(torch.float32).double()
    step = x.double().sub(below).sign() * (below.abs() * 2.0**-6)  # at least the distance of neighbours
    assert ((drawn - below).abs() <= step.abs()).all()
    error = (drawn.mean(0) - x).abs() / (drawn.std(0) / 5_000**0.5)
    assert error.max() < 5  # deviations of the mean
    exact = torch.tensor([1.0, -0.375, 0.0])
    assert torch.equal(round_stochastically(exact, generator), exact.bfloat16())


def fit(optimizer: torch.optim.Optimizer, weight: Tensor, steps: int) -> float:
    generator = torch.Generator().manual_seed(1)
    target = torch.randn(weight.shape, generator=generator)
    loss = torch.zeros(())
    for _ in range(steps):
        noise = torch.randn(weight.shape, generator=generator)
        loss = (weight - target + 0.1 * noise).square().mean()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    return float(loss.detach())


def test_it_follows_adamw_where_rounding_to_the_nearest_would_lose_every_change() -> None:
    options = {"lr": 0.02, "betas": (0.9, 0.999), "weight_decay": 0.1}
    weights = [torch.zeros(40, 30, requires_grad=True) for _ in range(3)]
    optimizers = [torch.optim.AdamW([weights[0]], **options)]  # type: ignore[arg-type]
    optimizers += [BFloat16AdamW([weight], **options) for weight in weights[1:]]  # type: ignore[arg-type,list-item]
    losses = [fit(optimizer, weight, 200) for optimizer, weight in zip(optimizers, weights, strict=True)]
    assert abs(losses[1] / losses[0] - 1) < 0.05
    apart = (weights[1] - weights[0]).norm() / weights[0].norm()
    assert apart < 0.02
    assert torch.equal(weights[1], weights[2]), "the chance is that of the step and the place"
    exact, rounded = (optimizers[i].state[weights[i]]["exp_avg_sq"] for i in (0, 1))
    assert rounded.dtype == torch.bfloat16
    assert abs(float(rounded.float().mean() / exact.mean()) - 1) < 0.01
