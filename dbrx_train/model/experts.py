"""The experts, and the one seam at which tokens sorted by expert meet their weights.

Shape suffixes: N tokens after dispatch (top_k copies of each), D d_model, F ffn_hidden_size, E experts.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor, nn
from torch.distributed.tensor import DTensor
from torch.nn import functional as F

from dbrx_train.model.config import DbrxConfig

ExpertsFn = Callable[[Tensor, Tensor, Tensor, Tensor, Tensor], Tensor]
"""(x [N, D] sorted by expert, w1, v1, w2 [E, F, D], tokens_per_expert [E]) -> y [N, D]."""


def loop(x_ND: Tensor, w1_EFD: Tensor, v1_EFD: Tensor, w2_EFD: Tensor, tokens_per_expert: Tensor) -> Tensor:
    """The reference: one expert after another, y = (silu(x w1') * (x v1')) w2."""
    outputs, start = [], 0
    for expert, count in enumerate(tokens_per_expert.tolist()):
        x = x_ND[start : start + count]
        hidden = F.silu(x @ w1_EFD[expert].T) * (x @ v1_EFD[expert].T)
        outputs.append(hidden @ w2_EFD[expert])
        start += count
    return torch.cat(outputs)


def grouped(
    x_ND: Tensor, w1_EFD: Tensor, v1_EFD: Tensor, w2_EFD: Tensor, tokens_per_expert: Tensor
) -> Tensor:
    """Contiguous segments: torch's grouped matrix product where it exists and fits, else segment by segment.

    The grouped product never asks the device for the counts, so the host can run ahead.
    """
    if grouped_mm_fits(x_ND, w1_EFD):
        mm = torch.nn.functional.grouped_mm  # type: ignore[attr-defined,unused-ignore]
        ends = tokens_per_expert.cumsum(0).to(torch.int32)
        gate = mm(x_ND, w1_EFD.transpose(1, 2), offs=ends)
        up = mm(x_ND, v1_EFD.transpose(1, 2), offs=ends)
        y: Tensor = mm(F.silu(gate) * up, w2_EFD, offs=ends)
        return y
    # split and unbind, not indexing: their backward writes every gradient once, where each w[e] would
    # add a zero-filled tensor the size of all experts.
    segments = torch.split(x_ND, tokens_per_expert.tolist())
    weights = zip(w1_EFD.unbind(), v1_EFD.unbind(), w2_EFD.unbind(), strict=True)
    return torch.cat(
        [(F.silu(x @ w1.T) * (x @ v1.T)) @ w2 for x, (w1, v1, w2) in zip(segments, weights, strict=True)]
    )


def grouped_mm_fits(x_ND: Tensor, w_EFD: Tensor) -> bool:
    """Newer torch has it, wants rows that are multiples of 16 bytes, and is no use to a single expert."""
    aligned = all(width * x_ND.element_size() % 16 == 0 for width in w_EFD.shape[1:])
    return hasattr(torch.nn.functional, "grouped_mm") and aligned and w_EFD.shape[0] > 1


EXPERT_FNS: dict[str, ExpertsFn] = {"auto": grouped, "loop": loop, "grouped": grouped}


class GatedExperts(nn.Module):
    """The weights of all experts of a layer, stacked by rows: expert e is rows [e*F, (e+1)*F).

    Kept 2-D as released: sharding by rows then never pads, however few the experts.
    """

    def __init__(self, config: DbrxConfig) -> None:
        super().__init__()
        self.ffn_hidden_size = config.ffn_hidden_size
        self.run = EXPERT_FNS[config.expert_impl]
        shape = config.num_experts * config.ffn_hidden_size, config.d_model
        self.w1 = nn.Parameter(torch.empty(shape))
        self.v1 = nn.Parameter(torch.empty(shape))
        self.w2 = nn.Parameter(torch.empty(shape))

    def forward(self, x_ND: Tensor, tokens_per_expert: Tensor) -> Tensor:
        """x [N, D] sorted by expert, tokens_per_expert [E] -> [N, D], computed in x's dtype."""
        return self.run(x_ND, *self.by_expert(x_ND.dtype), tokens_per_expert)

    def by_expert(self, dtype: torch.dtype) -> tuple[Tensor, Tensor, Tensor]:
        """w1, v1 and w2 of the experts that this rank holds, [E, F, D]."""
        own = (w.to_local() if isinstance(w, DTensor) else w for w in (self.w1, self.v1, self.w2))
        w1, v1, w2 = (w.to(dtype).view(-1, self.ffn_hidden_size, w.shape[-1]) for w in own)
        return w1, v1, w2


class Experts(nn.Module):
    """Holds `mlp`, where the released checkpoint has it.

    `exchange`, if set, brings tokens to experts that other ranks hold, and their outputs back.
    """

    def __init__(self, config: DbrxConfig) -> None:
        super().__init__()
        self.mlp = GatedExperts(config)
        self.exchange: Callable[[GatedExperts, Tensor, Tensor], Tensor] | None = None

    def forward(self, x_ND: Tensor, tokens_per_expert: Tensor) -> Tensor:
        """See GatedExperts."""
        if self.exchange is not None:
            return self.exchange(self.mlp, x_ND, tokens_per_expert)
        y: Tensor = self.mlp(x_ND, tokens_per_expert)
        return y
