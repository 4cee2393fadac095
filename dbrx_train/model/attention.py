"""Grouped-query attention with rotary positions, as DBRX has it.

Shape suffixes: B batch, S sequence, D d_model, H query heads, K key/value heads, C head_dim.
"""

from __future__ import annotations

from typing import TypeAlias

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.nn.attention import SDPBackend, sdpa_kernel

from dbrx_train.model.config import DbrxConfig
from dbrx_train.model.documents import DocumentOffsets, attend_by_document, attend_by_offset

Mask: TypeAlias = Tensor | DocumentOffsets | list[list[int]] | None
"""What attention takes to keep documents apart: `additive_mask`, `document_offsets`, `document_lengths`,
or nothing."""

# Not cuDNN's, the first choice of newer torch on an H100: it plans for each new length, which takes a second.
_KERNELS = [SDPBackend.FLASH_ATTENTION, SDPBackend.EFFICIENT_ATTENTION, SDPBackend.MATH]


class RotaryEmbedding:
    """Rotary position embedding in the half-rotation convention (arXiv 2104.09864).

    Not a module: it owns no tensor, so there is nothing to materialise after meta-device construction.
    """

    def __init__(self, head_dim: int, theta: float) -> None:
        self.head_dim = head_dim
        self.theta = theta

    def __call__(self, positions: Tensor) -> tuple[Tensor, Tensor]:
        """positions [B or 1, S] -> cos and sin, float32, [B or 1, 1, S, head_dim], for every layer."""
        exponent = torch.arange(0, self.head_dim, 2, device=positions.device).float() / self.head_dim
        angles = positions[:, None, :, None].float() * (1.0 / self.theta**exponent)
        angles = torch.cat((angles, angles), dim=-1)
        return angles.cos(), angles.sin()


def apply_rotary(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Rotate x [B, heads, S, head_dim] in x's dtype, as the released model does."""
    left, right = x.chunk(2, dim=-1)
    return x * cos.to(x.dtype) + torch.cat((-right, left), dim=-1) * sin.to(x.dtype)


def additive_mask(visible: Tensor, dtype: torch.dtype) -> Tensor:
    """visible [..., queries, keys], boolean -> 0 where a query may look, -inf elsewhere, for every layer.

    A boolean mask, or one whose rows are not aligned, would be turned into such a one by the attention of
    each layer and kept there for the backward pass; this one all layers share.
    """
    *rows, keys = visible.shape
    aligned = -(-keys // 16) * 16
    mask = torch.zeros(*rows, aligned, dtype=dtype, device=visible.device)[..., :keys]
    return mask.masked_fill_(~visible, -torch.inf)


class LayerCache:
    """The keys and values of one layer so far; room for `capacity` tokens, taken at the first append."""

    def __init__(self, capacity: int) -> None:
        self.capacity = capacity
        self.length = 0
        self._kv: Tensor | None = None

    def append(self, k_BKSC: Tensor, v_BKSC: Tensor) -> tuple[Tensor, Tensor]:
        """Add S tokens; returns the keys and values of all tokens, [B, K, length, C] each."""
        if self._kv is None:
            batch, heads, _, width = k_BKSC.shape
            self._kv = k_BKSC.new_empty(2, batch, heads, self.capacity, width)
        start, self.length = self.length, self.length + k_BKSC.shape[2]
        assert self.length <= self.capacity
        self._kv[0, :, :, start : self.length] = k_BKSC
        self._kv[1, :, :, start : self.length] = v_BKSC
        keys, values = self._kv[:, :, :, : self.length]
        return keys, values


class KVCache:
    """Keys and values of every layer, for generation without gradients; sequences advance together."""

    def __init__(self, n_layers: int, capacity: int) -> None:
        self.layers = [LayerCache(capacity) for _ in range(n_layers)]

    @property
    def length(self) -> int:
        """Tokens seen so far."""
        return self.layers[0].length

    @property
    def capacity(self) -> int:
        """Most tokens that fit."""
        return self.layers[0].capacity


class GroupedQueryAttention(nn.Module):
    """Causal self-attention; `n_heads / n_kv_heads` query heads share a key/value head."""

    def __init__(self, config: DbrxConfig) -> None:
        super().__init__()
        self.n_heads, self.n_kv_heads, self.head_dim = config.n_heads, config.n_kv_heads, config.head_dim
        self.clip_qkv = config.clip_qkv
        heads = self.n_heads + 2 * self.n_kv_heads
        self.Wqkv = nn.Linear(config.d_model, heads * self.head_dim, bias=False)
        self.out_proj = nn.Linear(config.d_model, config.d_model, bias=False)

    def forward(
        self,
        x_BSD: Tensor,
        rope: tuple[Tensor, Tensor],
        mask: Mask = None,
        cache: LayerCache | None = None,
    ) -> Tensor:
        """x [B, S, D] -> [B, S, D].

        rope: cos and sin for these S positions. mask: of `additive_mask`, in the dtype of the products,
        broadcast to [B, H, S, keys], or what else keeps documents apart; None is causal. cache: earlier
        keys and values, extended in place.
        """
        B, S, _ = x_BSD.shape
        qkv = self.Wqkv(x_BSD)
        if self.clip_qkv is not None:
            qkv = qkv.clamp(-self.clip_qkv, self.clip_qkv)
        qkv = qkv.view(B, S, -1, self.head_dim).transpose(1, 2)
        q, k, v = qkv.split((self.n_heads, self.n_kv_heads, self.n_kv_heads), dim=1)
        q, k = apply_rotary(q, *rope), apply_rotary(k, *rope)
        if cache is not None:
            k, v = cache.append(k, v)
        if S == 1 and (mask is None or isinstance(mask, Tensor)):
            # Heads that share keys become queries of one head: nothing is copied, which is most of a step.
            q = q.view(B, self.n_kv_heads, -1, self.head_dim)
            return self._out(F.scaled_dot_product_attention(q, k, v, mask).reshape(B, S, -1))
        return self._out(self._attend(q, k, v, mask).transpose(1, 2).reshape(B, S, -1))

    def _attend(self, q: Tensor, k: Tensor, v: Tensor, mask: Mask) -> Tensor:
        """q [B, H, S, C], k and v [B, K, keys, C] -> [B, H, S, C]."""
        if isinstance(mask, DocumentOffsets):
            return attend_by_offset(q, k, v, mask)
        # Only CUDA's flash kernel, of 16 bits and without a mask, shares heads without falling back to plain
        # matmuls.
        shares_heads = q.is_cuda and q.dtype.itemsize == 2 and not isinstance(mask, Tensor)
        if not shares_heads:
            k, v = (t.repeat_interleave(self.n_heads // self.n_kv_heads, dim=1) for t in (k, v))
        if isinstance(mask, list):
            return attend_by_document(q, k, v, mask, shares_heads)
        # Without a mask the queries are all of the sequence, or the last one alone, which sees every key.
        options = {"is_causal": mask is None and q.shape[2] > 1, "enable_gqa": shares_heads}
        if not q.is_cuda:
            return F.scaled_dot_product_attention(q, k, v, mask, **options)
        with sdpa_kernel(_KERNELS):
            return F.scaled_dot_product_attention(q, k, v, mask, **options)

    def _out(self, y_BSD: Tensor) -> Tensor:
        out: Tensor = self.out_proj(y_BSD)
        return out
