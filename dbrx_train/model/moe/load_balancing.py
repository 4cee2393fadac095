"""Auxiliary losses and statistics of routing, over the layers of one forward pass.

Shape suffixes: L layers, T tokens, E experts.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from dbrx_train.model.moe.router import Routing


class RoutingStats(NamedTuple):
    """How a forward pass loaded its experts, detached; padding is not counted."""

    tokens_per_expert: Tensor
    """[L, E] int64."""
    mean_probs: Tensor
    """[L, E] float32, the router's probability of each expert averaged over tokens."""
    token_entropy: Tensor
    """[L] entropy of a token's probabilities over log E, averaged over tokens: 1.0 knows no preference."""
    z: Tensor
    """[L] logsumexp(logits)^2 averaged over tokens."""
    max_logit: Tensor
    """[L] the largest logit of any token."""

    @property
    def entropy(self) -> Tensor:
        """[L] normalised entropy of the load: 1.0 when uniform, 0.0 when one expert takes everything."""
        return load_entropy(self.tokens_per_expert)


def load_entropy(tokens_per_expert: Tensor) -> Tensor:
    """Entropy of the load over the last dimension, divided by log E; 0 where there are no tokens at all."""
    load = tokens_per_expert.double()
    share = load / load.sum(-1, keepdim=True).clamp(min=1)
    entropy: Tensor = torch.special.entr(share).sum(-1) / math.log(load.shape[-1])
    return entropy.float()


@torch.no_grad()
def routing_stats(routings: Sequence[Routing], token_mask: Tensor | None = None) -> RoutingStats:
    """Stack the layers' statistics; token_mask [T] is False for padding."""
    tokens_LE = torch.stack([r.tokens_per_expert for r in routings])
    probs_LTE = torch.stack([r.probs for r in routings])
    logits_LTE = torch.stack([r.logits for r in routings])
    logsumexp_LT = logits_LTE.logsumexp(-1)
    entropy_LT = (logsumexp_LT - (probs_LTE * logits_LTE).sum(-1)) / math.log(probs_LTE.shape[-1])
    terms_LT2 = torch.stack((entropy_LT, logsumexp_LT.square()), -1)
    entropy_L, z_L = _mean_over_tokens(terms_LT2, token_mask).unbind(-1)
    if token_mask is not None:
        logits_LTE = logits_LTE.masked_fill(~token_mask[None, :, None], -math.inf)
    probs_LE = _mean_over_tokens(probs_LTE, token_mask)
    return RoutingStats(tokens_LE, probs_LE, entropy_L, z_L, logits_LTE.amax((1, 2)))


def balance_loss(
    routings: Sequence[Routing],
    convention: str,
    token_mask: Tensor | None = None,
    tokens_LE: Tensor | None = None,
) -> Tensor:
    """The load-balancing loss of Switch Transformer (arXiv 2101.03961), unweighted; a scalar with gradient.

    tokens_LE: the load to even out, where it is not that of these routings alone. With f the share of tokens
    that choose an expert and p the mean probability of it, per layer:

    - "megablocks": mean over layers of E/k * sum_e f_e * p_e, which is 1.0 at perfect balance
      (`batched_load_balancing_loss` of MegaBlocks);
    - "huggingface": E * sum_e mean_layers(f_e) * mean_layers(p_e), which is k at perfect balance
      (`load_balancing_loss_func` of transformers 4.57). Opposite imbalances of two layers cancel.
    """
    num_experts, top_k = routings[0].probs.shape[-1], routings[0].expert_ids.shape[-1]
    if tokens_LE is None:
        tokens_LE = torch.stack([r.tokens_per_expert for r in routings])
    choices_LE = tokens_LE / tokens_LE.sum(-1, keepdim=True).clamp(min=1) * top_k
    probs_LE = _mean_probs(routings, token_mask)
    if convention == "megablocks":
        return num_experts / top_k * (choices_LE * probs_LE).sum(-1).mean()
    assert convention == "huggingface", convention
    return num_experts * (choices_LE.mean(0) * probs_LE.mean(0)).sum()


def router_z_loss(routings: Sequence[Routing], token_mask: Tensor | None = None) -> Tensor:
    """Mean over real tokens and layers of logsumexp(logits)^2 (ST-MoE, arXiv 2202.08906, equation 5)."""
    squares_LT = torch.stack([r.logits.logsumexp(-1).square() for r in routings])
    return _mean_over_tokens(squares_LT[..., None], token_mask).mean()


def _mean_probs(routings: Sequence[Routing], token_mask: Tensor | None) -> Tensor:
    return _mean_over_tokens(torch.stack([r.probs for r in routings]), token_mask)


def _mean_over_tokens(values_LTX: Tensor, token_mask: Tensor | None) -> Tensor:
    """[L, T, X] -> [L, X], over the tokens of the mask; 0 where there are none."""
    if token_mask is None:
        return values_LTX.mean(1)
    return (values_LTX * token_mask[None, :, None]).sum(1) / token_mask.sum().clamp(min=1)
