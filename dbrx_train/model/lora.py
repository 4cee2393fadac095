"""Low-rank adapters (LoRA, arXiv 2106.09685) of attention and of every expert; all else stays as it is.

A matrix W becomes W + (alpha / rank) B A: A [rank, columns] is drawn, and B [rows, rank] is 0, so the model
begins as it was. Each expert has factors of its own, stacked by rows as its weights are: A [E*rank, D] and
B [E*F, rank]. The sum is never formed: tokens pass through the narrow factors beside the frozen weights,
which get no gradient.

Shape suffixes: N tokens sorted by expert, D d_model, F ffn_hidden_size, E experts, r rank, K and M any width.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, nn
from torch.distributed.tensor import DTensor
from torch.nn import functional as F

from dbrx_train.model.config import LORA_TARGETS, DbrxConfig
from dbrx_train.model.decoder import Dbrx
from dbrx_train.model.experts import GatedExperts, grouped_mm_fits
from dbrx_train.model.init import draw_rows

__all__ = ["adapt", "factor_names", "is_factor"]

_IN_ATTENTION = ("Wqkv", "out_proj")


def adapt(model: Dbrx, rank: int, alpha: float, targets: Sequence[str] = LORA_TARGETS, seed: int = 0) -> None:
    """Freeze ``model`` and give the matrices ``targets`` of every block factors that train.

    Factors are drawn from ``seed``; those of a model on the meta device are not (sharding it draws them).

    Raises:
        ValueError: the rank or a target is none.
    """
    if rank < 1:
        raise ValueError(f"rank: must be at least 1, not {rank}")
    if unknown := [target for target in targets if target not in LORA_TARGETS]:
        raise ValueError(f"targets: {unknown[0]!r} is not one of {', '.join(LORA_TARGETS)}")
    model.requires_grad_(False)
    scale = alpha / rank
    for block in model.transformer.blocks:
        attention, experts = block.norm_attn_norm.attn, block.ffn.experts
        for name in _IN_ATTENTION:
            if name in targets:
                setattr(attention, name, AdaptedLinear(getattr(attention, name), rank, scale))
        if own := [name for name in targets if name not in _IN_ATTENTION]:
            experts.mlp = AdaptedExperts(experts.mlp, model.config, rank, scale, own)
    for name, parameter in model.named_parameters():
        if is_factor(name) and not parameter.is_meta:
            rows, width = parameter.shape
            drawn = draw_rows(name, model.config, seed, (rows, width), 0, rows)
            parameter.data.copy_(drawn)


def factor_names(weight: str) -> tuple[str, str]:
    """The names of a weight's A and B, whether it has them or not."""
    stem = weight.removesuffix("weight") if weight.endswith(".weight") else f"{weight}_"
    return f"{stem}lora_A", f"{stem}lora_B"


def is_factor(name: str) -> bool:
    """True for an A or B, by its parameter name."""
    return name.endswith(("lora_A", "lora_B"))


class AdaptedLinear(nn.Linear):
    """A linear layer with the weight of another one, frozen, and two factors beside it."""

    def __init__(self, linear: nn.Linear, rank: int, scale: float) -> None:
        super().__init__(linear.in_features, linear.out_features, bias=False, device="meta")
        self.scale, self.weight = scale, linear.weight
        self.lora_A = nn.Parameter(self.weight.new_empty(rank, self.in_features))
        self.lora_B = nn.Parameter(self.weight.new_empty(self.out_features, rank))

    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x) + self.scale * F.linear(F.linear(x, self.lora_A), self.lora_B)


class AdaptedExperts(GatedExperts):
    """All experts of a layer, with the weights of others, frozen, and factors beside some of these."""

    def __init__(
        self, experts: GatedExperts, config: DbrxConfig, rank: int, scale: float, targets: Sequence[str]
    ) -> None:
        with torch.device("meta"):
            super().__init__(config)
        self.rank, self.scale = rank, scale
        for name in ("w1", "v1", "w2"):
            weight = getattr(experts, name)
            setattr(self, name, weight)
            if name in targets:
                factors = (config.num_experts * rank, config.d_model), (weight.shape[0], rank)
                for factor, shape in zip(factor_names(name), factors, strict=True):
                    self.register_parameter(factor, nn.Parameter(weight.new_empty(shape)))

    def forward(self, x_ND: Tensor, tokens_per_expert: Tensor) -> Tensor:
        """As GatedExperts."""
        counts, width = tokens_per_expert, self.ffn_hidden_size

        def narrow_first(x_NK: Tensor, name: str) -> Tensor:
            y_NF = segment_mm(x_NK, self._of(name, width, x_NK).mT, counts)
            if not hasattr(self, factor_names(name)[0]):
                return y_NF
            A_ErD, B_EFr = self._factors(name, x_NK)
            return y_NF + self.scale * segment_mm(segment_mm(x_NK, A_ErD.mT, counts), B_EFr.mT, counts)

        hidden_NF = F.silu(narrow_first(x_ND, "w1")) * narrow_first(x_ND, "v1")
        y_ND = segment_mm(hidden_NF, self._of("w2", width, x_ND), counts)
        if hasattr(self, "w2_lora_A"):  # w2 is stored input by output
            A_ErD, B_EFr = self._factors("w2", x_ND)
            y_ND = y_ND + self.scale * segment_mm(segment_mm(hidden_NF, B_EFr, counts), A_ErD, counts)
        return y_ND

    def _factors(self, name: str, like: Tensor) -> tuple[Tensor, Tensor]:
        a, b = factor_names(name)
        return self._of(a, self.rank, like), self._of(b, self.ffn_hidden_size, like)

    def _of(self, name: str, rows: int, like: Tensor) -> Tensor:
        """A parameter by expert, [this rank's experts, rows, width], in the dtype of the products."""
        parameter = getattr(self, name)
        own = parameter.to_local() if isinstance(parameter, DTensor) else parameter
        return own.to(like.dtype).view(-1, rows, own.shape[-1])


def segment_mm(x_NK: Tensor, w_EKM: Tensor, tokens_per_expert: Tensor) -> Tensor:
    """Each expert's tokens, sorted by expert, times its matrix: [N, M]."""
    if grouped_mm_fits(x_NK, w_EKM):
        mm = torch.nn.functional.grouped_mm  # type: ignore[attr-defined,unused-ignore]
        y: Tensor = mm(x_NK, w_EKM, offs=tokens_per_expert.cumsum(0).to(torch.int32))
        return y
    segments = torch.split(x_NK, tokens_per_expert.tolist())
    return torch.cat([x @ w for x, w in zip(segments, w_EKM.unbind(), strict=True)])
