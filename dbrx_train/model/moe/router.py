"""The router: which experts each token visits, and with what weight.

Shape suffixes: T tokens, D d_model, E experts, k experts per token.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor, nn

from dbrx_train.model.config import DbrxConfig


class Routing(NamedTuple):
    """Where one layer sent its tokens. A tuple, so that checkpointing and sharding hooks see its tensors."""

    logits: Tensor
    """[T, E] float32, with gradient."""
    probs: Tensor
    """[T, E] float32 softmax of the logits, with gradient."""
    weights: Tensor
    """[T, k] the chosen experts' weights, in the dtype of the router's input."""
    expert_ids: Tensor
    """[T, k] int64."""
    tokens_per_expert: Tensor
    """[E] int64, real tokens only."""


def count_tokens(expert_ids: Tensor, num_experts: int, token_mask: Tensor | None = None) -> Tensor:
    """How often each expert was chosen, [E] int64; token_mask [T] is True for the tokens that count."""
    ones = (
        torch.ones_like(expert_ids)
        if token_mask is None
        else token_mask[:, None].expand_as(expert_ids).long()
    )
    counts = torch.zeros(num_experts, dtype=torch.int64, device=expert_ids.device)
    return counts.scatter_add(0, expert_ids.flatten(), ones.flatten())


class Router(nn.Module):
    """Softmax over all experts in float32, then the top k, divided by their p-norm.

    With `loss_free_bias_rate` above 0, a bias per expert is added to the scores for the choice of experts
    only, never to their weights (arXiv 2408.15664, algorithm 1); `update_bias` moves it once a step.
    """

    expert_bias: Tensor | None

    def __init__(self, config: DbrxConfig) -> None:
        super().__init__()
        self.num_experts, self.top_k = config.num_experts, config.top_k
        self.jitter = config.router_jitter
        self.norm_p = config.normalize_expert_weights
        self.bias_rate = config.loss_free_bias_rate
        self.layer = nn.Linear(config.d_model, config.num_experts, bias=False)
        bias = torch.zeros(config.num_experts, dtype=torch.float32) if self.bias_rate > 0 else None
        self.register_buffer("expert_bias", bias)

    def forward(self, x_TD: Tensor, token_mask: Tensor | None = None) -> Routing:
        """Route x [T, D]; token_mask [T] is False for padding, which is routed but not counted."""
        with torch.autocast(x_TD.device.type, enabled=False):
            logits_TE = self.layer(self._jittered(x_TD).to(self.layer.weight.dtype)).float()
            probs_TE = logits_TE.softmax(dim=-1)
            scores_TE = probs_TE if self.expert_bias is None else probs_TE + self.expert_bias
            ids_Tk = scores_TE.topk(self.top_k, dim=-1).indices
            weights_Tk = probs_TE.gather(-1, ids_Tk)
            if self.norm_p is not None:
                weights_Tk = weights_Tk / torch.linalg.vector_norm(
                    weights_Tk, self.norm_p, dim=-1, keepdim=True
                )
        counts_E = count_tokens(ids_Tk, self.num_experts, token_mask)
        return Routing(logits_TE, probs_TE, weights_Tk.to(x_TD.dtype), ids_Tk, counts_E)

    def _jittered(self, x: Tensor) -> Tensor:
        if not self.training or self.jitter == 0:
            return x
        return x * torch.empty_like(x).uniform_(1 - self.jitter, 1 + self.jitter)

    @torch.no_grad()
    def update_bias(self, tokens_per_expert: Tensor) -> None:
        """bias += rate * sign(mean load - load): favour the experts that got too few of a step's tokens.

        tokens_per_expert: [E], summed over the whole global batch.
        """
        assert self.expert_bias is not None, "loss_free_bias_rate is 0"
        load = tokens_per_expert.to(self.expert_bias)
        self.expert_bias += self.bias_rate * (load.mean() - load).sign()
