"""The experts, and the one seam at which tokens sorted by expert meet their weights.

Shape suffixes: N tokens after dispatch (top_k copies of each), D d_model, F ffn_hidden_size, E experts.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial

import torch
from torch import Tensor, nn
from torch.distributed.tensor import DTensor
from torch.nn import functional as F

from dbrx_train.model.config import DbrxConfig
from dbrx_train.model.moe.grouped_glu import check_available, grouped_glu

ExpertsFn = Callable[[Tensor, Tensor | None, Tensor, Tensor, Tensor, Tensor], Tensor]
"""(x [N, D] sorted by expert, weight [N] or None, w1, v1, w2 [E, F, D], tokens_per_expert [E]) -> [N, D]."""


def loop(
    x_ND: Tensor,
    weight_N: Tensor | None,
    w1_EFD: Tensor,
    v1_EFD: Tensor,
    w2_EFD: Tensor,
    tokens_per_expert: Tensor,
) -> Tensor:
    """The reference: one expert after another, y = weight * (silu(x w1') * (x v1')) w2."""
    outputs, start = [], 0
    for expert, count in enumerate(tokens_per_expert.tolist()):
        x = x_ND[start : start + count]
        hidden = F.silu(x @ w1_EFD[expert].T) * (x @ v1_EFD[expert].T)
        outputs.append(hidden @ w2_EFD[expert])
        start += count
    y_ND = torch.cat(outputs)
    return y_ND if weight_N is None else y_ND * weight_N[:, None]


_IMPLS = ("auto", "grouped", "grouped_mm", "grouped_gemm")
EXPERT_FNS: dict[str, ExpertsFn] = {
    "loop": loop,
    **{impl: partial(grouped_glu, impl=impl) for impl in _IMPLS},
}


class GatedExperts(nn.Module):
    """The weights of all experts of a layer, stacked by rows: expert e is rows [e*F, (e+1)*F).

    Kept 2-D as released: sharding by rows then never pads, however few the experts.
    """

    def __init__(self, config: DbrxConfig) -> None:
        super().__init__()
        self.ffn_hidden_size = config.ffn_hidden_size
        check_available(config.expert_impl)
        self.run: ExpertsFn = EXPERT_FNS[config.expert_impl]
        shape = config.num_experts * config.ffn_hidden_size, config.d_model
        self.w1 = nn.Parameter(torch.empty(shape))
        self.v1 = nn.Parameter(torch.empty(shape))
        self.w2 = nn.Parameter(torch.empty(shape))

    def forward(self, x_ND: Tensor, tokens_per_expert: Tensor, weight_N: Tensor | None = None) -> Tensor:
        """x [N, D] sorted by expert, tokens_per_expert [E], weight [N] -> [N, D], computed in x's dtype."""
        return self.run(x_ND, weight_N, *self.by_expert(x_ND.dtype), tokens_per_expert)

    def by_expert(self, dtype: torch.dtype) -> tuple[Tensor, Tensor, Tensor]:
        """w1, v1 and w2 of the experts that this rank holds, [E, F, D]."""
        own = (w.to_local() if isinstance(w, DTensor) else w for w in (self.w1, self.v1, self.w2))
        w1, v1, w2 = (w.to(dtype).view(-1, self.ffn_hidden_size, w.shape[-1]) for w in own)
        return w1, v1, w2


@contextmanager
def without_answers(experts: GatedExperts) -> Iterator[None]:
    """Have ``experts`` leave out the product for their answers, which then are zero, where they can.

    For when they are computed again only for what their backward pass asks for.
    """
    run = experts.run
    if isinstance(run, partial) and run.func is grouped_glu:
        experts.run = partial(run, answers=False)
    try:
        yield
    finally:
        experts.run = run


class Experts(nn.Module):
    """Holds `mlp`, where the released checkpoint has it.

    `token_dispatcher`, if set, brings tokens to experts that other ranks hold, and their outputs back.
    """

    def __init__(self, config: DbrxConfig) -> None:
        super().__init__()
        self.mlp = GatedExperts(config)
        self.token_dispatcher: Callable[[GatedExperts, Tensor, Tensor, Tensor | None], Tensor] | None = None

    def forward(self, x_ND: Tensor, tokens_per_expert: Tensor, weight_N: Tensor | None = None) -> Tensor:
        """See GatedExperts."""
        if self.token_dispatcher is not None:
            return self.token_dispatcher(self.mlp, x_ND, tokens_per_expert, weight_N)
        answer: Tensor = self.mlp(x_ND, tokens_per_expert, weight_N)
        return answer
