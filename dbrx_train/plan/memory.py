"""Memory of a rank in closed form: what it holds at each moment of a step that may be its peak.

Held against the dry run, which observes it (``dry_run.py``); docs/dry-run.md says how well they agree.

Symbols: T tokens of a microbatch, d width, F an expert's hidden width, V words, L layers, k experts a token,
M = k T (times the skew where experts are spread) tokens at this rank's experts, b bytes of an element in the
lower precision.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch

from dbrx_train.model.config import DbrxConfig
from dbrx_train.parallel.mesh import MeshShape
from dbrx_train.plan.units import FLOAT32, Unit, fsdp_units

__all__ = ["Memory", "memory"]

Kinds = dict[str, int]


@dataclass(frozen=True)
class Memory:
    """Bytes that one rank holds."""

    moments: dict[str, Kinds]
    """By kind, at each moment of a step."""

    @property
    def peak_moment(self) -> str:
        return max(self.moments, key=lambda moment: sum(self.moments[moment].values()))

    @property
    def peak(self) -> Kinds:
        """By kind, at the peak."""
        return self.moments[self.peak_moment]

    @property
    def total(self) -> int:
        """Most that is allocated at once; CUDA's own and the communication library's come on top."""
        return sum(self.peak.values())

    @property
    def reserved(self) -> int:
        """What the caching allocator takes with expandable segments.

        Gradients and buffers of gathers are of streams of their own, whose memory no other uses meanwhile.
        """
        apart = ("gradients", "gather buffers")
        rest = max(
            sum(n for kind, n in kinds.items() if kind not in apart) for kinds in self.moments.values()
        )
        return rest + sum(max(kinds[kind] for kinds in self.moments.values()) for kind in apart)

    @property
    def shards(self) -> int:
        """Of ``total``: parameters, optimizer state, and the gradients that there are."""
        return sum(self.peak[kind] for kind in ("parameters", "optimizer state", "gradients"))

    @property
    def gathered(self) -> int:
        """Of ``total``: parameters gathered from other ranks and gradients on their way to them."""
        return sum(self.peak[kind] for kind in ("gathered", "gather buffers", "scattered"))

    @property
    def activations(self) -> int:
        """Of ``total``: all else, which is proportional to tokens, and the head with its gradient."""
        return self.total - self.shards - self.gathered


@dataclass(frozen=True)
class _Work:
    """Bytes of a block's activations and of what its backward pass makes, for a microbatch."""

    kept: int
    """From the forward pass on."""
    again: int
    """Computed again while the experts' backward pass runs."""
    experts: int
    """Made by the experts' backward pass, without gradients of weights."""
    attention: int
    """Computed again, and made, by attention's backward pass."""


def memory(
    config: DbrxConfig,
    shape: MeshShape,
    *,
    tokens: int,
    param_dtype: torch.dtype | None = None,
    activation_checkpointing: str = "none",
    reshard_after_forward: bool = True,
    accumulates: bool = False,
    skew: float = 1.0,
    moments: int = 2,
) -> Memory:
    """Of a model that ``parallelize`` spread, for a rank's ``tokens`` a microbatch; an estimate.

    ``accumulates``: a step has several microbatches. ``skew``: tokens that a rank's spread experts get, over
    an even share. ``moments``: tensors of optimizer state a parameter, 2 of AdamW. Left out are attention's
    masks, at most 0.1 GB.
    """
    parts = fsdp_units(config, shape, param_dtype, True, "none")
    b = (param_dtype or torch.float32).itemsize
    wte, *blocks, _, head = parts
    inner = [unit for unit in blocks[: len(blocks) // config.n_layers] if unit.itemsize == b or b == FLOAT32]
    local = sum(unit.padded // unit.ranks for unit in parts) * FLOAT32
    held = {"parameters": local, "optimizer state": moments * local}
    stream = tokens * config.d_model * FLOAT32
    work = _work(config, tokens, b, activation_checkpointing, shape.expert > 1, skew)
    kept_gathered = 0 if reshard_after_forward else sum(u.padded for u in inner) * b * config.n_layers
    before = local if accumulates else 0

    def moment(**kinds: int) -> Kinds:
        names = ("gradients", "gathered", "gather_buffers", "scattered", "head", "activations", "backward")
        return held | {name.replace("_", " "): kinds.get(name, 0) for name in names}

    def block(layers: int) -> Kinds:
        """The backward pass of a block, with so many blocks' activations left, itself included."""
        done = before or local * (config.n_layers - layers) // config.n_layers
        found = []
        for at_work in _block_moments(inner, work, b, reshard_after_forward):
            gathered = at_work.pop("gathered") if reshard_after_forward else kept_gathered
            extra = at_work.pop("backward") + stream
            found.append(
                moment(
                    gradients=done,
                    gathered=gathered,
                    activations=work.kept * layers,
                    backward=extra,
                    **at_work,
                )
            )
        return max(found, key=lambda kinds: sum(kinds.values()))

    logits = min(config.loss_chunk_size, tokens) * config.vocab_size * (FLOAT32 + b)
    ends = {"activations": work.kept * config.n_layers + 3 * stream + tokens * config.d_model * b}
    total, lower = head.padded * FLOAT32, head.padded * b
    return Memory(
        {
            "head forward": moment(
                gradients=before,
                gathered=lower + kept_gathered,
                gather_buffers=lower,
                # Its gradient in float32, and what a chunk adds to it
                head=total + (lower if b < FLOAT32 else 0) + logits,
                **ends,
            ),
            "head backward": moment(
                gradients=before, gathered=lower + kept_gathered, head=total + lower, **ends
            ),
            "last block's backward": block(config.n_layers),
            "first block's backward": block(1),
            "embedding's backward": moment(
                gradients=local, scattered=wte.padded * FLOAT32, backward=wte.padded * FLOAT32 + stream
            ),
        }
    )


def _block_moments(inner: list[Unit], work: _Work, b: int, reshard: bool) -> list[Kinds]:
    """What FSDP and the backward pass of a block add: at the experts', at a scattering, at attention's."""
    sizes = [unit.padded for unit in inner]
    # Of spread experts the first of two; the block's own is scattered last, and its buffer then kept.
    experts, own = (sizes[0], sizes[-1]) if len(sizes) > 1 else (sizes[0], sizes[0])
    every = sum(sizes)
    buffers = b * (every + experts) if reshard else 0  # of what is gathered ahead, and the latest that was
    return [
        {
            "gathered": b * every,
            "gather_buffers": buffers,
            "scattered": FLOAT32 * own,
            "backward": work.again + work.experts + b * experts,
        },
        {
            "gathered": b * (every - experts),
            "gather_buffers": buffers,
            "scattered": FLOAT32 * experts,
            "backward": work.again + b * experts,
        },
        {
            "gathered": b * every,
            "gather_buffers": buffers,
            "scattered": FLOAT32 * experts,
            "backward": work.attention + (b * every if len(sizes) == 1 else b * own),
        },
    ]


def _work(config: DbrxConfig, tokens: int, b: int, what: str, spread: bool, skew: float) -> _Work:
    d, kv, ffn = config.d_model, config.n_kv_heads * config.head_dim, config.ffn_hidden_size
    rows = config.top_k * (skew if spread else 1.0)
    stream = FLOAT32 * d
    # Input, q, k, v before and after rotation (heads repeated), attention's output
    attention = b * (6 * d + 2 * kv)
    # Their input; theirs from other ranks come back to be weighted
    experts = b * rows * (d + 2 * ffn) + (b * config.top_k * d if spread else 0)
    between = 2 * stream  # the residual stream, and its norm
    products = b * (3 * d + 2 * kv + rows * (d + 2 * ffn))
    everything = stream + attention + between + experts
    kept = {
        "none": everything,
        "full": stream,
        "selective": stream + products,
        "norm_attn_norm": 2 * stream + experts,
    }[what]
    recomputes_block = what in ("full", "selective")
    return _Work(
        kept=round(tokens * kept),
        again=round(tokens * (everything - kept)) if recomputes_block else 0,
        experts=round(tokens * b * rows * max(2 * ffn + 2 * d, ffn + 3 * d)),
        attention=round(tokens * (attention + between)),
    )
