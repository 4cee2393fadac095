"""AdamW with moments in bfloat16: 4 bytes of state a parameter instead of 8."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch import Tensor
from torch.distributed.tensor import DTensor

__all__ = ["BFloat16AdamW", "round_stochastically"]


class BFloat16AdamW(torch.optim.Optimizer):
    """AdamW (arXiv 1711.05101) that computes in float32 and keeps its moments in bfloat16.

    Rounding to the nearest would lose every change of a moment by less than bfloat16 can hold, 1 part in 256;
    so it is rounded up or down by chance, right on average (arXiv 2010.06192). The chance depends on the step
    and the parameter's place alone: replicas round alike, and so does a run that goes on.
    """

    def __init__(
        self,
        params: Iterable[Any],
        lr: float = 1e-3,
        betas: tuple[float, float] = (0.9, 0.999),
        eps: float = 1e-8,
        weight_decay: float = 0.01,
    ) -> None:
        super().__init__(params, {"lr": lr, "betas": betas, "eps": eps, "weight_decay": weight_decay})

    @torch.no_grad()
    def step(self, closure: Callable[[], Any] | None = None) -> Any:
        loss = None
        if closure is not None:
            with torch.enable_grad():  # type: ignore[no-untyped-call]
                loss = closure()
        places = itertools.count()
        for group in self.param_groups:
            for p, place in zip(group["params"], places, strict=False):
                if p.grad is not None:
                    self._update(group, p, place)
        return loss

    def _update(self, group: dict[str, Any], parameter: Tensor, place: int) -> None:
        state = self.state[parameter]
        if not state:
            state["step"] = torch.zeros(())
            for moment in ("exp_avg", "exp_avg_sq"):
                state[moment] = torch.zeros_like(parameter, dtype=torch.bfloat16)
        state["step"] += 1
        step, lr, (beta1, beta2) = int(state["step"]), group["lr"], group["betas"]
        assert parameter.grad is not None
        p, grad = _local(parameter), _local(parameter.grad)
        kept = [_local(state[moment]) for moment in ("exp_avg", "exp_avg_sq")]
        mean, square = (moment.float() for moment in kept)
        mean.lerp_(grad, 1 - beta1)
        square.mul_(beta2).addcmul_(grad, grad, value=1 - beta2)
        p.mul_(1 - lr * group["weight_decay"])
        scale = square.div(1 - beta2**step).sqrt_().add_(group["eps"])
        p.addcdiv_(mean, scale, value=-lr / (1 - beta1**step))
        # Spread over 32 bits: of a seed a CPU's generator takes no more.
        seed = (step * 0x9E3779B1 + place * 0x85EBCA6B) % 2**32
        generator = torch.Generator(p.device).manual_seed(seed)
        for rounded, exact in zip(kept, (mean, square), strict=True):
            rounded.copy_(round_stochastically(exact, generator))


def round_stochastically(x: Tensor, generator: torch.Generator) -> Tensor:
    """x, float32 -> one of the two nearest bfloat16, whose mean is x. Not for infinities."""
    # bfloat16 is the upper half of float32: by chance, in proportion, the lower half carries into it.
    noise = torch.randint(1 << 16, x.shape, generator=generator, device=x.device, dtype=torch.int32)
    return noise.add_(x.view(torch.int32)).bitwise_and_(-1 << 16).view(torch.float32).bfloat16()


def _local(tensor: Tensor) -> Tensor:
    return tensor.to_local() if isinstance(tensor, DTensor) else tensor
