"""The DBRX decoder. Modules and parameters are named as in the released checkpoint.

Shape suffixes: B batch, S sequence, D d_model, V vocabulary, L layers, E experts.
"""

from __future__ import annotations

import itertools
import os
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import NamedTuple

import torch
from torch import Tensor, nn

from dbrx_train.model.attention import (
    GroupedQueryAttention,
    KVCache,
    LayerCache,
    Mask,
    RotaryEmbedding,
    additive_mask,
)
from dbrx_train.model.config import LONGEST_MASK, DbrxConfig
from dbrx_train.model.documents import (
    document_lengths,
    document_offsets,
    document_starts,
    takes_offsets,
)
from dbrx_train.model.init import init_weights
from dbrx_train.model.loss import IGNORE_INDEX, HeadLoss, LMHead
from dbrx_train.model.moe import load_balancing
from dbrx_train.model.moe.layer import MoE
from dbrx_train.model.moe.load_balancing import RoutingStats
from dbrx_train.model.moe.router import Routing
from dbrx_train.model.precision import compute_dtype


class Layout(NamedTuple):
    """Where each token stands and what it may look at, of rows that are no plain sequences."""

    positions: Tensor
    """[B, S], as rotary embeddings count them."""
    visible: Tensor
    """[B, S, keys] boolean; keys are those of the cache, then the row's own."""


@dataclass
class DbrxOutput:
    """What a forward pass returns."""

    logits: Tensor | None = None
    """[B, S, V], where asked for or where there are no labels; [N, V] where it was said of which tokens."""
    loss: Tensor | None = None
    """Scalar: cross-entropy plus every auxiliary loss times its weight. The one to differentiate.

    Where log-probabilities were asked for, the auxiliary losses alone."""
    log_probs: Tensor | None = None
    """[B, S] float32, where asked for: of the label that each token predicts; 0 where it predicts none."""
    losses: dict[str, Tensor] = field(default_factory=dict)
    """Raw terms, unweighted and detached: cross_entropy and, where in use, balance, router_z, output_z."""
    num_labels: Tensor | None = None
    """How many labels the cross-entropy is a mean of."""
    token_losses: Tensor | None = None
    """[B, S] float32, detached: cross-entropy of what each token predicts; 0 where it predicts nothing."""
    routing: RoutingStats | None = None
    """Load of the experts; None for a dense model."""


def make_norm(config: DbrxConfig) -> nn.Module:
    """Normalises the residual stream; has a weight and no bias."""
    if config.norm == "rmsnorm":
        return nn.RMSNorm(config.d_model, eps=config.norm_eps)
    return nn.LayerNorm(config.d_model, eps=config.norm_eps, bias=False)


class NormAttentionNorm(nn.Module):
    """Attention with its residual, and the norm ahead of the experts."""

    def __init__(self, config: DbrxConfig) -> None:
        super().__init__()
        self.norm_1 = make_norm(config)
        self.attn = GroupedQueryAttention(config)
        self.norm_2 = make_norm(config)

    def forward(
        self, x_BSD: Tensor, rope: tuple[Tensor, Tensor], mask: Mask, cache: LayerCache | None
    ) -> tuple[Tensor, Tensor]:
        """x -> the residual stream after attention, and the same normalised."""
        x_BSD = x_BSD + self.attn(self.norm_1(x_BSD), rope, mask, cache)
        return x_BSD, self.norm_2(x_BSD)


class Block(nn.Module):
    """x += attention(norm(x)); x += experts(norm(x))."""

    def __init__(self, config: DbrxConfig) -> None:
        super().__init__()
        self.norm_attn_norm = NormAttentionNorm(config)
        self.ffn = MoE(config)

    def forward(
        self,
        x_BSD: Tensor,
        rope: tuple[Tensor, Tensor],
        mask: Mask = None,
        token_mask: Tensor | None = None,
        cache: LayerCache | None = None,
    ) -> tuple[Tensor, Routing | None]:
        """x [B, S, D] -> x and this layer's routing; the other arguments as in attention and MoE."""
        x_BSD, normed_BSD = self.norm_attn_norm(x_BSD, rope, mask, cache)
        y_BSD, routing = self.ffn(normed_BSD, token_mask)
        return x_BSD + y_BSD, routing


class Transformer(nn.Module):
    """Embedding, blocks and final norm: all but the head."""

    def __init__(self, config: DbrxConfig) -> None:
        super().__init__()
        self.wte = nn.Embedding(config.vocab_size, config.d_model)
        self.blocks = nn.ModuleList(Block(config) for _ in range(config.n_layers))
        self.norm_f = make_norm(config)
        self.rotary = RotaryEmbedding(config.head_dim, config.rope_theta)
        self.mask_documents, self.reset_positions = config.mask_documents, config.reset_positions

    def forward(
        self,
        input_ids: Tensor,
        document_ids: Tensor | None = None,
        cache: KVCache | None = None,
        layout: Layout | None = None,
        starts: Tensor | None = None,
    ) -> tuple[Tensor, list[Routing]]:
        """input_ids [B, S] -> hidden states [B, S, D] and the layers' routings (none when dense)."""
        past, S = cache.length if cache else 0, input_ids.shape[1]
        positions = torch.arange(past, past + S, device=input_ids.device)[None]
        x_BSD = self.wte(input_ids)
        dtype = compute_dtype(x_BSD)
        mask: Mask = None
        token_mask = None
        if layout is not None:
            positions, mask = layout.positions, additive_mask(layout.visible[:, None], dtype)
        elif document_ids is not None:
            token_mask = document_ids >= 0
            if self.mask_documents:
                mask = self.separate(document_ids, starts, dtype)
            positions = document_positions(document_ids) if self.reset_positions else positions
        elif past and S > 1:
            visible = torch.ones(S, past + S, dtype=torch.bool, device=input_ids.device).tril(past)
            mask = additive_mask(visible, dtype)

        rope = self.rotary(positions)
        routings = []
        for i, block in enumerate(self.blocks):
            x_BSD, routing = block(x_BSD, rope, mask, token_mask, cache.layers[i] if cache else None)
            if routing is not None:
                routings.append(routing)
        return self.norm_f(x_BSD), routings

    def separate(self, document_ids: Tensor, starts: Tensor | None, dtype: torch.dtype) -> Mask:
        """What keeps documents apart in attention that multiplies in ``dtype``.

        starts: `document_starts`, on the device. A dry run, which has no ids to look at, puts its own
        in this one's place.
        """
        S = document_ids.shape[1]
        at_once = takes_offsets(document_ids.device, dtype, self.rotary.head_dim)
        if not at_once and S <= LONGEST_MASK:
            return additive_mask(document_mask(document_ids), dtype)
        if starts is None:
            starts = document_starts(document_ids.cpu()).to(document_ids.device)
        return document_offsets(starts, S) if at_once else document_lengths(starts, S)


class Dbrx(nn.Module):
    """A DBRX-style language model.

    Weights are drawn from `seed` (by default torch's initial seed), the same on every device. Under
    `torch.device("meta")` nothing is drawn: call `to_empty(device=...)` and `init_weights(seed)` later.

    `batch_load`, if set, makes of a training pass's tokens per expert [L, E] those that the balance loss is
    to even out, such as the whole batch's.
    """

    def __init__(self, config: DbrxConfig, seed: int | None = None) -> None:
        super().__init__()
        self.config = config
        self.batch_load: Callable[[Tensor], Tensor] | None = None
        device = torch.empty(0).device  # torch.get_default_device() does not see `with torch.device(...)`
        with torch.device("meta"):  # so that no layer draws weights of its own first
            self.transformer = Transformer(config)
            self.lm_head = LMHead(
                config.d_model, config.vocab_size, config.loss_chunk_size, config.output_z_loss_weight
            )
        if device.type != "meta":
            self.to_empty(device=device)
            self.init_weights(seed)

    @property
    def input_device(self) -> torch.device:
        """Where its inputs lie: shards may be offloaded, but buffers never are."""
        return next(itertools.chain(self.buffers(), self.parameters())).device

    def init_weights(self, seed: int | None = None) -> None:
        """Draw every weight anew from `seed` (None: torch's initial seed)."""
        init_weights(self, self.config, torch.initial_seed() if seed is None else seed)

    def forward(
        self,
        input_ids: Tensor,
        labels: Tensor | None = None,
        document_ids: Tensor | None = None,
        cache: KVCache | None = None,
        return_logits: bool = False,
        return_log_probs: bool = False,
        layout: Layout | None = None,
        logits_at: Tensor | None = None,
        document_starts: Tensor | None = None,
    ) -> DbrxOutput:
        """input_ids [B, S] -> logits, loss and routing statistics.

        labels [B, S]: as in transformers, labels[:, t] is the token at t and the model shifts; -100 ignored.
        document_ids [B, S]: the document each token belongs to, -1 for padding. With `mask_documents`, a
        token sees its own document only, and no token predicts the next document's first. Without, padding
        must trail. Padding never counts in a loss or a statistic.
        cache: earlier tokens of these sequences, extended by input_ids; cannot be joined with document_ids.
        return_log_probs: of each label, with gradient, for losses of one's own; `loss` is then without them.
        layout: positions and mask of the caller's, instead of those that follow from the rest.
        logits_at [N]: make the logits of these tokens alone, numbered along the rows of input_ids.
        document_starts [B, M]: `documents.document_starts` of document_ids; spares a GPU's host the wait.
        Raises ValueError for shapes that do not fit.
        """
        self._check_inputs(input_ids, labels, document_ids, cache, layout is not None)
        hidden_BSD, routings = self.transformer(input_ids, document_ids, cache, layout, document_starts)
        token_mask = None if document_ids is None else (document_ids >= 0).flatten()
        output = DbrxOutput()
        if routings:
            output.routing = load_balancing.routing_stats(routings, token_mask)
        if labels is None or return_logits:
            output.logits = self.lm_head(
                hidden_BSD if logits_at is None else hidden_BSD.flatten(0, 1)[logits_at]
            )
        if labels is not None:
            targets = shift_labels(labels, document_ids, self.config.mask_documents)
            if return_log_probs:
                head = self._log_probs(output, hidden_BSD, targets)
            else:
                head = self.lm_head(hidden_BSD, targets)
            output.token_losses = head.token_losses.view(labels.shape)
            self._add_losses(output, head, routings, token_mask)
        return output

    def _log_probs(self, output: DbrxOutput, hidden_BSD: Tensor, targets: Tensor) -> HeadLoss:
        """Add them to the output; returns a loss of 0 with the cross-entropy that they mean."""
        log_probs: Tensor = self.lm_head(hidden_BSD, targets, log_probs=True)
        output.log_probs = log_probs
        count, zero = (targets != IGNORE_INDEX).sum(), log_probs.new_zeros(())
        losses = -log_probs.detach().flatten()
        return HeadLoss(zero, losses.sum() / count.clamp(min=1), zero, count, losses)

    def _add_losses(
        self, output: DbrxOutput, head: HeadLoss, routings: list[Routing], token_mask: Tensor | None
    ) -> None:
        config = self.config
        output.loss, output.num_labels = head.total, head.num_labels
        output.losses["cross_entropy"] = head.cross_entropy
        if config.output_z_loss_weight > 0:
            output.losses["output_z"] = head.z
        if routings and config.balance_loss != "none" and config.balance_loss_weight > 0:
            assert output.routing is not None
            load = output.routing.tokens_per_expert
            if self.batch_load is not None and self.training:
                load = self.batch_load(load)
            raw = load_balancing.balance_loss(routings, config.balance_loss, token_mask, load)
            output.losses["balance"] = raw.detach()
            output.loss = output.loss + config.balance_loss_weight * raw
        if routings and config.router_z_loss_weight > 0:
            raw = load_balancing.router_z_loss(routings, token_mask)
            output.losses["router_z"] = raw.detach()
            output.loss = output.loss + config.router_z_loss_weight * raw

    def _check_inputs(
        self,
        input_ids: Tensor,
        labels: Tensor | None,
        document_ids: Tensor | None,
        cache: KVCache | None,
        laid_out: bool,
    ) -> None:
        shape = tuple(input_ids.shape)
        if len(shape) != 2:
            raise ValueError(f"input_ids: has shape {shape}; must be [batch, sequence]")
        for name, other in (("labels", labels), ("document_ids", document_ids)):
            if other is not None and tuple(other.shape) != shape:
                raise ValueError(
                    f"{name}: has shape {tuple(other.shape)}; must be that of input_ids, {shape}"
                )
        if cache is not None and document_ids is not None:
            raise ValueError("document_ids: cannot be joined with a cache; generate from one document a row")
        if laid_out:
            return  # a row may hold several sequences, and a cache some of other lengths
        past, limit = (0, self.config.max_seq_len) if cache is None else (cache.length, cache.capacity)
        limit = min(limit, self.config.max_seq_len)
        if past + shape[1] > limit:
            raise ValueError(f"input_ids: {past + shape[1]} tokens do not fit; must be at most {limit}")

    @torch.no_grad()
    def update_expert_bias(self, tokens_per_expert: Tensor) -> None:
        """Loss-free balancing: move every router's bias by a step's load [L, E] of the global batch."""
        for block, load in zip(self.transformer.blocks, tokens_per_expert, strict=True):
            block.ffn.router.update_bias(load)

    @classmethod
    def from_pretrained(cls, folder: str | os.PathLike[str], dtype: torch.dtype | None = None) -> Dbrx:
        """Load a Hugging Face DBRX folder; see `dbrx_train.model.hf.files.load`."""
        from dbrx_train.model.hf import files

        return files.load(cls, folder, dtype)

    def save_pretrained(self, folder: str | os.PathLike[str]) -> None:
        """Write a Hugging Face DBRX folder; see `dbrx_train.model.hf.files.save`."""
        from dbrx_train.model.hf import files

        files.save(self, folder)


def document_mask(document_ids: Tensor) -> Tensor:
    """[B, S] -> [B, 1, S, S], True where a query may look: at or before itself, in its own document."""
    same = document_ids[:, None, :, None] == document_ids[:, None, None, :]
    return same.tril()


def document_positions(document_ids: Tensor) -> Tensor:
    """[B, S] -> [B, S], each token's position within its document."""
    position = torch.arange(document_ids.shape[1], device=document_ids.device).expand_as(document_ids)
    is_first = torch.ones_like(document_ids, dtype=torch.bool)
    is_first[:, 1:] = document_ids[:, 1:] != document_ids[:, :-1]
    return position - position.where(is_first, 0).cummax(1).values


def shift_labels(labels: Tensor, document_ids: Tensor | None, mask_documents: bool) -> Tensor:
    """labels [B, S] -> targets [B, S]: what each token must predict, -100 where nothing."""
    targets = torch.full_like(labels, IGNORE_INDEX)
    targets[:, :-1] = labels[:, 1:]
    if document_ids is not None:
        here, following = document_ids[:, :-1], document_ids[:, 1:]
        keep = (here >= 0) & (following >= 0)
        if mask_documents:
            keep &= here == following
        targets[:, :-1].masked_fill_(~keep, IGNORE_INDEX)
    return targets
