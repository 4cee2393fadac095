"""How long a training step takes: a roofline with partial overlap, calibrated on published runs.

    step = (accumulated - 1) * with_overlap(compute, weights) + with_overlap(compute, weights + replicas)
           + accumulated * tokens + optimizer
    with_overlap(a, b) = (a^p + b^p)^(1/p)

p is 1 where nothing overlaps and infinite where all does. docs/planning.md explains every term;
``scripts/plan_calibration.py`` fits the constants, and says how far off they are.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

from dbrx_train.model.config import DbrxConfig
from dbrx_train.plan.hardware import GPU

__all__ = [
    "CALIBRATED",
    "RUNTIME",
    "Architecture",
    "Calibration",
    "Compute",
    "StepTime",
    "compute",
    "optimizer_seconds",
    "retries",
    "with_overlap",
]

RUNTIME = 4e9
"""Bytes of a GPU's memory that no tensor can have: CUDA's context, NCCL's buffers, cuBLAS's workspace."""
_LOGIT_PASSES = 16.0
"""Bytes of memory that the loss reads and writes a logit: two dtypes, values and gradients."""
_OPTIMIZER_PASSES = 36.0
"""Bytes that clipping and AdamW read and write a parameter, all float32."""


@dataclass(frozen=True)
class Calibration:
    """Constants that all GPUs share."""

    memory: float = 0.8
    """Share of a GPU's memory bandwidth that is attained."""
    passes: float = 2.47
    """Times that elementwise kernels move what `Architecture.elementwise` counts, for none is fused."""
    overlap: float = 1.07
    """The p of computing and communication."""
    hop: float = 3.7e-6
    """Seconds that a ring's chunk takes from one rank to the next."""
    nvlink: float = 0.8
    """Share of NVLink's bandwidth in one direction that is attained."""
    network: float = 0.74
    """Share of the network adapter's bandwidth that is attained."""
    tight: float = 0.9
    """Share of a GPU's usable memory beyond which the allocator frees and asks anew."""
    retries: float = 1.29
    """How much longer steps then take."""


CALIBRATED = Calibration()


@dataclass(frozen=True)
class Architecture:
    """What of a decoder takes time."""

    d_model: int
    n_layers: int
    query_width: int
    kv_width: int
    """Of the keys; the values are as wide."""
    ffn_hidden_size: int
    ffn_matrices: int
    """3 where the FFN is gated, else 2."""
    num_experts: int
    top_k: int
    vocab_size: int
    stream_bytes: int
    """Of an element of the residual stream and the norms."""
    rotary: bool = True
    shared_ffn: int = 0
    """Hidden width of an expert that every token visits, too."""

    @classmethod
    def of(cls, config: DbrxConfig) -> Architecture:
        return cls(
            d_model=config.d_model,
            n_layers=config.n_layers,
            query_width=config.d_model,
            kv_width=config.n_kv_heads * config.head_dim,
            ffn_hidden_size=config.ffn_hidden_size,
            ffn_matrices=3,
            num_experts=config.num_experts,
            top_k=config.top_k,
            vocab_size=config.vocab_size,
            stream_bytes=4,
        )

    def elementwise(self, part: str) -> int:
        """Bytes that a block's elementwise kernels read and write a token, in one forward pass.

        ``part`` is ``attention`` (a norm, clamping and rotation, a residual sum), ``activation`` (of the FFN)
        or ``ffn`` (a norm, a residual sum; of experts also their tokens' dispatch and combination).
        """
        d, stream = self.d_model, self.stream_bytes * 5 * self.d_model  # a norm: 2, a sum: 3
        if part == "attention":
            rotated = 2 * 2 * (self.query_width + 2 * self.kv_width)
            return stream + (rotated if self.rotary else 0)
        if part == "activation":
            return 2 * self.ffn_matrices * (self.top_k * self.ffn_hidden_size + self.shared_ffn)
        routed = 0 if self.num_experts == 1 else 2 * (4 * self.top_k + 1) * d
        return stream + routed


@dataclass(frozen=True)
class Compute:
    """Seconds of a microbatch's forward and backward pass on one GPU, by kind; nothing is exchanged."""

    dense_products: float
    expert_products: float
    head: float
    attention: float
    elementwise: float

    @property
    def total(self) -> float:
        return self.dense_products + self.expert_products + self.head + self.attention + self.elementwise


def compute(
    model: Architecture,
    gpu: GPU,
    *,
    tokens: int,
    seq_len: int,
    activation_checkpointing: str = "none",
    local_experts: int | None = None,
    imbalance: float = 1.0,
    masked: bool = False,
    old_kernels: bool = False,
    frozen: bool = False,
    constants: Calibration = CALIBRATED,
) -> Compute:
    """The roofline: FLOPs over what is attained of the peak, plus bytes over what is attained of memory.

    Args:
        tokens: of a microbatch on this GPU.
        activation_checkpointing: as ``checkpoint_activations`` takes it.
        local_experts: how many experts of a layer the GPU holds; by default all.
        imbalance: tokens of the fullest GPU's experts, relative to the mean.
        masked: attention is given a mask of all pairs: every query meets every key, by a kernel that is not
            made for the GPU, and so is taken to be as slow as those of 2023.
        old_kernels: as in 2023: attention's kernels, and an FFN that is computed again to its end.
        frozen: weights get no gradient, as beside adapters.
    """
    flops, bandwidth = gpu.peak * gpu.products, gpu.memory_bandwidth * constants.memory
    # Forward once and backward twice (once where weights are frozen); once more what is computed again.
    once = 2 if frozen else 3
    whole = activation_checkpointing in ("full", "full_keep_dispatched")
    block = once + whole
    attention_again = whole or activation_checkpointing == "norm_attn_norm"
    attention_block = once + attention_again

    def product(rows: float, k: int, n: int, weights: int = 1) -> float:
        """Seconds of [rows, k] x [k, n], over ``weights`` matrices among which the rows are divided."""
        moved = 2 * (rows * k + rows * n + weights * k * n)
        return 2 * rows * k * n / flops + moved / bandwidth

    d, layers = model.d_model, model.n_layers
    projections = product(tokens, d, model.query_width + 2 * model.kv_width)
    projections += product(tokens, model.query_width, d)
    shared = model.ffn_matrices * product(tokens, d, model.shared_ffn) if model.shared_ffn else 0.0
    rows, held = tokens * model.top_k * imbalance, local_experts or model.num_experts
    # The last product and the activation before it, on which no gradient depends, are not computed again.
    to_its_end = whole and (old_kernels or frozen)
    again = model.ffn_matrices - (not to_its_end) if whole else 0
    experts = (once * model.ffn_matrices + again) * product(rows, d, model.ffn_hidden_size, held)

    pairs = seq_len if masked else seq_len / 2
    # Two products forward, five backward (arXiv 2205.14135), and two more if computed again.
    passes = 2 + 5 + 2 * attention_again
    attained = gpu.peak * (gpu.attention_2023 if old_kernels or masked else gpu.attention)
    attention = 2 * passes * tokens * pairs * model.query_width / attained

    def passed(part: str, again: bool) -> float:
        return model.elementwise(part) * (4 if again else 3)

    moved = passed("attention", activation_checkpointing != "none")
    moved += passed("ffn", whole or activation_checkpointing == "selective")
    moved += passed("activation", to_its_end)
    logits = tokens * model.vocab_size * _LOGIT_PASSES / bandwidth
    return Compute(
        dense_products=layers * (attention_block * projections + block * shared),
        expert_products=layers * experts,
        head=once * product(tokens, d, model.vocab_size) + logits,
        attention=layers * attention,
        elementwise=layers * tokens * moved * constants.passes / bandwidth,
    )


def with_overlap(computing: float, communicating: float, p: float) -> float:
    """Seconds that both take together; all overlaps where ``p`` is infinite."""
    if math.isinf(p):
        return max(computing, communicating)
    return float((computing**p + communicating**p) ** (1 / p))


@dataclass(frozen=True)
class StepTime:
    """An optimizer step, in seconds, and what it is made of."""

    compute: Compute
    """Of a microbatch."""
    accumulated: int
    """Microbatches of the step."""
    weights: float
    """Of a microbatch: gathering parameters and scattering gradients, alone on their links."""
    tokens: float
    """Of a microbatch: tokens to their experts and back, which nothing hides."""
    replicas: float
    """Gradients between replicas, in the last microbatch."""
    optimizer: float
    retries: float
    """Factor on all, for memory that is nearly full."""
    constants: Calibration = CALIBRATED

    @property
    def total(self) -> float:
        return self._total(self.constants.overlap)

    @property
    def at_best(self) -> float:
        """With all communication of weights and gradients hidden that can be."""
        return self._total(math.inf)

    @property
    def exposed(self) -> float:
        """Seconds of communication that no computing hides."""
        computing = self.accumulated * self.compute.total + self.optimizer
        return max(0.0, self.total / self.retries - computing)

    def _total(self, p: float) -> float:
        first = with_overlap(self.compute.total, self.weights, p)
        last = with_overlap(self.compute.total, self.weights + self.replicas, p)
        both = (self.accumulated - 1) * first + last
        return self.retries * (both + self.accumulated * self.tokens + self.optimizer)


def optimizer_seconds(elements: float, gpu: GPU, constants: Calibration = CALIBRATED) -> float:
    """Seconds of clipping and AdamW over a rank's ``elements``."""
    return elements * _OPTIMIZER_PASSES / (gpu.memory_bandwidth * constants.memory)


def retries(held: float, gpu: GPU, constants: Calibration = CALIBRATED) -> float:
    """How much longer a step takes because little of the GPU's memory is left beside ``held`` bytes."""
    return constants.retries if held > constants.tight * (gpu.memory - RUNTIME) else 1.0
