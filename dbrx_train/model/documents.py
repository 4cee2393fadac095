"""Causal attention within each of the documents that are packed into a sample.

Shape suffixes: B batch, S sequence, M most documents of a sample, T = B * S tokens, H query heads,
K key/value heads, C head_dim.
"""

from __future__ import annotations

import importlib
import importlib.util
import inspect
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.nn import functional as F

__all__ = [
    "VARIABLE_LENGTH",
    "DocumentOffsets",
    "attend_by_document",
    "attend_by_offset",
    "document_lengths",
    "document_offsets",
    "document_starts",
    "takes_offsets",
]


def document_starts(document_ids: Tensor) -> Tensor:
    """document_ids [B, S] on the CPU -> where each document of a sample begins, int32 [B, M]; S where it has
    fewer than M.

    Raises ValueError for a document in several pieces; padding (-1) may be.
    """
    length = document_ids.shape[1]
    begins = torch.ones_like(document_ids, dtype=torch.bool)
    begins[:, 1:] = document_ids[:, 1:] != document_ids[:, :-1]
    rows = [row.nonzero().flatten() for row in begins]
    for ids, starts in zip(document_ids, rows, strict=True):
        pieces = ids[starts][ids[starts] >= 0]
        if pieces.unique().numel() != pieces.numel():
            raise ValueError("document_ids: has a document in pieces; in a sample it must lie together")
    result = torch.full((len(rows), max(map(len, rows), default=0)), length, dtype=torch.int32)
    for row, starts in zip(result, rows, strict=True):
        row[: len(starts)] = starts
    return result


# --- one document after another -----------------------------------------------------------------------------


def document_lengths(starts_BM: Tensor, length: int) -> list[list[int]]:
    """Of samples of ``length`` tokens, the lengths of each one's documents; the host waits for them."""
    ends = torch.cat((starts_BM[:, 1:], starts_BM.new_full((len(starts_BM), 1), length)), 1)
    return [[count for count in row if count] for row in (ends - starts_BM).tolist()]


def attend_by_document(
    q_BHSC: Tensor, k_BKSC: Tensor, v_BKSC: Tensor, lengths: list[list[int]], shares_heads: bool
) -> Tensor:
    """Attention within each document, one after another: no mask, and no work across documents."""
    rows = []
    for q, k, v, row in zip(q_BHSC, k_BKSC, v_BKSC, lengths, strict=True):
        documents = zip(*(t[None].split(row, dim=2) for t in (q, k, v)), strict=True)
        parts = [
            F.scaled_dot_product_attention(q, k, v, is_causal=True, enable_gqa=shares_heads)
            for q, k, v in documents
        ]
        rows.append(torch.cat(parts, dim=2))
    return torch.cat(rows)


# --- all documents at once ----------------------------------------------------------------------------------


class DocumentOffsets(NamedTuple):
    """Where the documents of a batch lie in all its tokens, for attention of variable lengths."""

    offsets: Tensor
    """int32 [B * M + 1], on the tokens' device; where a sample has fewer than M, documents of no tokens."""
    longest: int
    """A bound on a document's tokens."""


def takes_offsets(device: torch.device, dtype: torch.dtype, head_dim: int) -> bool:
    """Whether there is a kernel that takes ``DocumentOffsets``: flash attention's, on CUDA in 16 bits."""
    return (
        device.type == "cuda"
        and dtype in (torch.bfloat16, torch.float16)
        and head_dim % 8 == 0
        and head_dim <= 256
    )


def document_offsets(starts_BM: Tensor, length: int) -> DocumentOffsets:
    """Of samples of ``length`` tokens; on the device of ``starts_BM``, for which the host does not wait."""
    samples = starts_BM.shape[0]
    first_B = torch.arange(samples, device=starts_BM.device, dtype=torch.int32) * length
    # The end, by the same addition: a number from the host would have to be sent.
    end = first_B[-1:] + length
    return DocumentOffsets(torch.cat(((starts_BM + first_B[:, None]).flatten(), end)), length)


def attend_by_offset(q_BHSC: Tensor, k_BKSC: Tensor, v_BKSC: Tensor, documents: DocumentOffsets) -> Tensor:
    """Attention within each document, by one kernel for all, which shares key/value heads itself."""
    batch, _, length, _ = q_BHSC.shape
    q_THC, k_TKC, v_TKC = (t.transpose(1, 2).flatten(0, 1) for t in (q_BHSC, k_BKSC, v_BKSC))
    y_THC = _variable_length(q_THC, k_TKC, v_TKC, documents)
    return y_THC.view(batch, length, *y_THC.shape[1:]).transpose(1, 2)


def _public() -> Any:
    """torch's own function, where it is and knows of shared heads (2.11); else None."""
    if importlib.util.find_spec("torch.nn.attention.varlen") is None:
        return None
    function: Any = importlib.import_module("torch.nn.attention.varlen").varlen_attn
    return (
        function if {"window_size", "enable_gqa"} <= inspect.signature(function).parameters.keys() else None
    )


_VARLEN_ATTN = _public()
VARIABLE_LENGTH: Any = None if _VARLEN_ATTN is None else torch.ops.torch_attn._varlen_attn.default
"""The operator that torch's function is; None where it is aten's, which is found by its name."""


def _variable_length(q: Tensor, k: Tensor, v: Tensor, documents: DocumentOffsets) -> Tensor:
    """q [T, H, C], k and v [T, K, C] -> [T, H, C]."""
    offsets, longest = documents
    lengths = (offsets, offsets, longest, longest)
    if _VARLEN_ATTN is not None:
        shares = q.shape[1] != k.shape[1]
        y: Tensor = _VARLEN_ATTN(q, k, v, *lengths, window_size=(-1, 0), enable_gqa=shares)
        return y
    flash: Any = torch.ops.aten._flash_attention_forward.default
    dropout, causal, wants_mask = 0.0, True, False
    found: Tensor = flash(q, k, v, *lengths, dropout, causal, wants_mask)[0]
    return found
