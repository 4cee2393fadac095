"""Memory of a rank in closed form: what it holds at each moment of a step that may be its peak.

Held against the dry run, which observes it (``dry_run.py``); docs/dry-run.md says how well they agree.

Symbols: T tokens of a microbatch, d width, F an expert's hidden width, V words, L layers, k experts a token,
M = k T (times the skew where experts are spread) tokens at this rank's experts, b bytes of an element in the
lower precision.
"""

from __future__ import annotations

from dataclasses import dataclass

from dbrx_train.model.config import DbrxConfig
from dbrx_train.parallel.mesh import MeshShape
from dbrx_train.plan.units import FLOAT32, HasItemsize, Unit, fsdp_units

__all__ = ["GATHERED", "STATES", "Memory", "memory"]

Kinds = dict[str, int]

STATES = ("parameters", "optimizer state", "gradients")
GATHERED = ("gathered", "gather buffers", "scattered")


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
        return sum(self.peak[kind] for kind in STATES)

    @property
    def gathered(self) -> int:
        """Of ``total``: parameters gathered from other ranks and gradients on their way to them."""
        return sum(self.peak[kind] for kind in GATHERED)

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
    param_dtype: HasItemsize | None = None,
    reduce_dtype: HasItemsize | None = None,
    activation_checkpointing: str = "none",
    reshard_after_forward: bool = True,
    accumulates: bool = False,
    skew: float = 1.0,
    state_bytes: int = 8,
) -> Memory:
    """Of a model that ``parallelize`` spread, for a rank's ``tokens`` a microbatch; an estimate.

    ``accumulates``: a step has several microbatches. ``skew``: tokens that a rank's spread experts get, over
    an even share. ``state_bytes``: of optimizer state, a parameter. Left out are attention's masks, at most
    0.1 GB.
    """
    parts = fsdp_units(config, shape, param_dtype, True, reduce_dtype)
    b = param_dtype.itemsize if param_dtype else FLOAT32
    wte, *blocks, _, head = parts
    inner = [unit for unit in blocks[: len(blocks) // config.n_layers] if unit.itemsize == b or b == FLOAT32]
    local = sum(unit.padded // unit.ranks for unit in parts) * FLOAT32
    held = {"parameters": local, "optimizer state": local // FLOAT32 * state_bytes}
    stream = tokens * config.d_model * FLOAT32
    work = _work(config, tokens, b, activation_checkpointing, spread=shape.expert > 1, skew=skew)
    kept_gathered = 0 if reshard_after_forward else sum(u.padded for u in inner) * b * config.n_layers
    before = local if accumulates else 0

    def moment(**kinds: int) -> Kinds:
        names = ("gradients", "gathered", "gather_buffers", "scattered", "head", "activations", "backward")
        return held | {name.replace("_", " "): kinds.get(name, 0) for name in names}

    def block(left: int) -> list[Kinds]:
        """The backward pass of a block, of as many as ``left`` whose activations are still there."""
        done = before or local * (config.n_layers - left) // config.n_layers
        common = {"gradients": done, "activations": work.kept * left}
        found = []
        for added in _block_moments(inner, work, b, first=left == config.n_layers, last=left == 1):
            if not reshard_after_forward:
                added |= {"gathered": kept_gathered * left // config.n_layers, "gather_buffers": 0}
            found.append(moment(**common, **added | {"backward": added["backward"] + stream}))
        return found

    # But for the first and the last block all is linear in how many are left.
    ends_of_lines = {1, 2, config.n_layers - 1, config.n_layers} & set(range(1, config.n_layers + 1))
    blocks_backward = [kinds for left in sorted(ends_of_lines) for kinds in block(left)]
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
            "blocks backward": max(blocks_backward, key=lambda kinds: sum(kinds.values())),
            "embedding backward": moment(
                gradients=local, scattered=wte.padded * FLOAT32, backward=wte.padded * FLOAT32 + stream
            ),
        }
    )


def _block_moments(inner: list[Unit], work: _Work, b: int, *, first: bool, last: bool) -> list[Kinds]:
    """What FSDP and the backward pass of a block add: at the experts', at a scattering, at attention's.

    ``first`` and ``last``, of all blocks, in the order of the backward pass.
    """
    sizes, reduced = [unit.padded for unit in inner], inner[0].reduced
    # Spread experts are a unit of their own, the first of two.
    experts, own, every = sizes[0], sizes[-1], sum(sizes)
    ahead = 0 if last else b * every  # the next block, which is gathered meanwhile
    before = 0 if first else reduced * own  # what the block before scattered; freed when this one scatters
    return [
        {
            "gathered": b * every,
            "gather_buffers": ahead,
            "scattered": before,
            "backward": work.again + work.experts + b * experts,
        },
        {
            "gathered": b * (every - experts),
            "gather_buffers": ahead,
            "scattered": reduced * experts,
            "backward": work.again + b * experts,
        },
        {
            "gathered": b * every,
            "gather_buffers": ahead,
            "scattered": reduced * experts if len(sizes) > 1 else before,
            "backward": work.attention + b * own,
        },
    ]


def _work(config: DbrxConfig, tokens: int, b: int, what: str, *, spread: bool, skew: float) -> _Work:
    d, kv, ffn = config.d_model, config.n_kv_heads * config.head_dim, config.ffn_hidden_size
    rows = config.top_k * (skew if spread else 1.0)
    stream = FLOAT32 * d
    # Input, q, k, v before and after rotation (heads repeated), attention's output
    attention = b * (6 * d + 2 * kv)
    experts = b * rows * (d + 2 * ffn)
    normed = 0 if config.is_dense else stream  # the router's input, in float32
    between = stream + normed
    products = b * (3 * d + 2 * kv + rows * (d + 2 * ffn))
    everything = stream + attention + between + experts
    kept = {
        "none": everything,
        "full": stream,
        "full_keep_dispatched": stream + (b * rows * d if spread else 0),
        "selective": stream + products,
        "norm_attn_norm": stream + normed + experts,
    }[what]
    recomputes_block = what in ("full", "full_keep_dispatched", "selective")
    return _Work(
        kept=round(tokens * kept),
        again=round(tokens * (everything - kept)) if recomputes_block else 0,
        experts=round(tokens * b * rows * max(2 * ffn + 2 * d, ffn + 3 * d)),
        attention=round(tokens * (attention + between)),
    )
