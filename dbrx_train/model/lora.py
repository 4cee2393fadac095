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
from dbrx_train.model.decoder import Block, Dbrx
from dbrx_train.model.init import draw_rows
from dbrx_train.model.moe.experts import GatedExperts

__all__ = ["apply_lora", "cast_frozen", "factor_modules", "factor_names", "is_factor"]

_IN_ATTENTION = ("Wqkv", "out_proj")


def apply_lora(
    model: Dbrx, rank: int, alpha: float, targets: Sequence[str] = LORA_TARGETS, seed: int = 0
) -> None:
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
            parameter.data.copy_(draw_rows(name, model.config, seed, (rows, width), 0, rows))


def cast_frozen(model: Dbrx, dtype: torch.dtype) -> None:
    """Keep the frozen matrices of an adapted model in ``dtype``, for use under autocast to it.

    It changes no number, as they would be cast in every product. What autocast leaves in float32 (embedding,
    norms, routers) stays, as do the factors.
    """
    for name, parameter in model.named_parameters():
        if name.endswith(("Wqkv.weight", "out_proj.weight", "mlp.w1", "mlp.v1", "mlp.w2", "lm_head.weight")):
            parameter.data = parameter.data.to(dtype)


def factor_names(weight: str) -> tuple[str, str]:
    """The names of a weight's A and B, whether it has them or not."""
    *module, last = weight.split(".")
    if last == "weight":
        stem = ".".join(module)
        return f"{stem}.lora_A.weight", f"{stem}.lora_B.weight"
    stem = ".".join([*module, "lora", last])
    return f"{stem}_A", f"{stem}_B"


def is_factor(name: str) -> bool:
    """True for an A or B, by its parameter name."""
    return any(part in ("lora", "lora_A", "lora_B") for part in name.split("."))


def factor_modules(block: Block) -> list[nn.Module]:
    """The modules of a block whose own parameters are factors; none if it has no adapters."""
    return [module for name, module in block.named_modules() if is_factor(name.split(".")[-1])]


class AdaptedLinear(nn.Linear):
    """A linear layer with the weight of another one, frozen, and two narrow ones beside it."""

    def __init__(self, linear: nn.Linear, rank: int, scale: float) -> None:
        super().__init__(linear.in_features, linear.out_features, bias=False, device="meta")
        self.scale, self.weight, device = scale, linear.weight, linear.weight.device
        self.lora_A = nn.Linear(self.in_features, rank, bias=False, device=device)
        self.lora_B = nn.Linear(rank, self.out_features, bias=False, device=device)

    def forward(self, x: Tensor) -> Tensor:
        added: Tensor = self.lora_B(self.lora_A(x))
        return super().forward(x) + self.scale * added


class AdaptedExperts(GatedExperts):
    """All experts of a layer, with the weights of others, frozen, and factors beside some of these."""

    def __init__(
        self, experts: GatedExperts, config: DbrxConfig, rank: int, scale: float, targets: Sequence[str]
    ) -> None:
        with torch.device("meta"):
            super().__init__(config)
        self.w1, self.v1, self.w2 = experts.w1, experts.v1, experts.w2
        self.lora = ExpertFactors(config, rank, scale, targets, experts.w1.device)

    def forward(self, x_ND: Tensor, tokens_per_expert: Tensor, weight_N: Tensor | None = None) -> Tensor:
        """As GatedExperts."""
        y_ND: Tensor = self.lora(x_ND, *self.by_expert(x_ND.dtype), tokens_per_expert)
        return y_ND if weight_N is None else y_ND * weight_N[:, None]


class ExpertFactors(nn.Module):
    """The factors of all experts of a layer, and what becomes of tokens with them.

    A module of its own, called once a pass, so that its parameters can be gathered apart from the weights.
    """

    def __init__(
        self, config: DbrxConfig, rank: int, scale: float, targets: Sequence[str], device: torch.device
    ) -> None:
        super().__init__()
        self.rank, self.ffn_hidden_size, self.scale = rank, config.ffn_hidden_size, scale
        for name in targets:
            for factor, rows, width in (("A", rank, config.d_model), ("B", config.ffn_hidden_size, rank)):
                empty = torch.empty(config.num_experts * rows, width, device=device)
                self.register_parameter(f"{name}_{factor}", nn.Parameter(empty))

    def forward(
        self, x_ND: Tensor, w1_EFD: Tensor, v1_EFD: Tensor, w2_EFD: Tensor, tokens_per_expert: Tensor
    ) -> Tensor:
        """(silu(x w1') * (x v1')) w2 with factors beside each matrix; arguments as in experts.py."""
        counts = tokens_per_expert

        def narrowing(name: str, w_EFD: Tensor) -> Tensor:
            y_NF = segment_mm(x_ND, w_EFD.mT, counts)
            if (factors := self._factors(name, x_ND)) is None:
                return y_NF
            A_ErD, B_EFr = factors
            return y_NF + self.scale * segment_mm(segment_mm(x_ND, A_ErD.mT, counts), B_EFr.mT, counts)

        hidden_NF = F.silu(narrowing("w1", w1_EFD)) * narrowing("v1", v1_EFD)
        y_ND = segment_mm(hidden_NF, w2_EFD, counts)
        if (factors := self._factors("w2", x_ND)) is None:
            return y_ND
        A_ErD, B_EFr = factors  # w2 is stored input by output
        return y_ND + self.scale * segment_mm(segment_mm(hidden_NF, B_EFr, counts), A_ErD, counts)

    def _factors(self, name: str, like: Tensor) -> tuple[Tensor, Tensor] | None:
        """A [E, r, D] and B [E, F, r] of this rank's experts, in the dtype of the products."""
        if not hasattr(self, f"{name}_A"):
            return None
        A, B = (
            (w.to_local() if isinstance(w, DTensor) else w).to(like.dtype)
            for w in (getattr(self, f"{name}_A"), getattr(self, f"{name}_B"))
        )
        return A.view(-1, self.rank, A.shape[1]), B.view(-1, self.ffn_hidden_size, self.rank)


def segment_mm(x_NK: Tensor, w_EKM: Tensor, tokens_per_expert: Tensor) -> Tensor:
    """Each expert's tokens, sorted by expert, times its matrix: [N, M]."""
    if w_EKM.shape[0] == 1:
        return x_NK @ w_EKM[0]
    # It wants rows that are multiples of 16 bytes.
    aligned = all(width * x_NK.element_size() % 16 == 0 for width in w_EKM.shape[1:])
    if hasattr(torch.nn.functional, "grouped_mm") and aligned:
        mm = torch.nn.functional.grouped_mm  # type: ignore[attr-defined,unused-ignore]
        y: Tensor = mm(x_NK, w_EKM, offs=tokens_per_expert.cumsum(0, dtype=torch.int32))
        return y
    segments = torch.split(x_NK, tokens_per_expert.tolist())
    return torch.cat([x @ w for x, w in zip(segments, w_EKM.unbind(), strict=True)])
