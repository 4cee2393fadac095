"""`DbrxConfig`: the shape of a DBRX-style decoder, and what follows from the shape alone."""

import difflib
import json
import os
from collections.abc import Mapping
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from typing import Any, Self

from dbrx_train.options import check, option

BALANCE_LOSSES = ("megablocks", "huggingface", "none")
EXPERT_IMPLS = ("auto", "loop", "grouped", "grouped_mm", "grouped_gemm")
INIT_METHODS = ("normal", "trunc_normal", "kaiming_normal")
LORA_TARGETS = ("Wqkv", "out_proj", "w1", "v1", "w2")
"""The matrices that adapters may be beside: attention's two, an expert's three."""
NORMS = ("layernorm", "rmsnorm")
# A mask of S x S entries is quick while it is small; in longer samples each document is attended to apart.
LONGEST_MASK = 8192
# Of a block; what each means is said where it is done, in parallel.activation_checkpointing.
ACTIVATION_CHECKPOINTING = ("none", "full", "full_keep_dispatched", "selective", "norm_attn_norm")


@dataclass
class DbrxConfig:
    """The architecture, its losses and its initialisation. The defaults are the released DBRX 132B.

    Raises ValueError, beginning with the field's name, for a value that makes no model.
    """

    d_model: int = option("Width of the residual stream.", 6144, ge=1)
    n_layers: int = option("Number of transformer blocks.", 40, ge=1)
    n_heads: int = option("Query heads; d_model must be a multiple.", 48, ge=1)
    n_kv_heads: int = option("Key and value heads (grouped-query attention); must divide n_heads.", 8, ge=1)
    vocab_size: int = option("Rows of the embedding and of the output head.", 100_352, ge=1)
    max_seq_len: int = option("Longest sequence accepted, in tokens.", 32_768, ge=1)
    ffn_hidden_size: int = option("Hidden width of one expert.", 10_752, ge=1)
    num_experts: int = option("Experts per layer; 1 is a dense model without a router.", 16, ge=1)
    top_k: int = option("Experts that each token visits.", 4, ge=1)
    rope_theta: float = option("Base of the rotary frequencies.", 500_000.0, gt=0)
    clip_qkv: float | None = option(
        "Clamp queries, keys and values to plus or minus this; null for none.", 8.0, gt=0
    )
    norm: str = option(
        "Normalisation: layernorm (without bias, as DBRX) or rmsnorm (arXiv 1910.07467).",
        "layernorm",
        one_of=NORMS,
    )
    norm_eps: float = option("Epsilon of the norms.", 1e-5, gt=0)
    router_jitter: float = option(
        "In training, multiply the router's input by uniform noise in 1 plus or minus this.", 0.0, ge=0, lt=1
    )
    normalize_expert_weights: float | None = option(
        "The p of the p-norm that a token's top-k weights are divided by; null for none.", 1.0, gt=0
    )
    balance_loss: str = option(
        "Load-balancing loss: megablocks (per layer, 1.0 at perfect balance), "
        "huggingface (layers averaged first, top_k at perfect balance) or none.",
        "megablocks",
        one_of=BALANCE_LOSSES,
    )
    balance_loss_weight: float = option("Weight of the load-balancing loss.", 0.05, ge=0)
    router_z_loss_weight: float = option(
        "Weight of the router z-loss (arXiv 2202.08906); 0 is off.", 0.0, ge=0
    )
    loss_free_bias_rate: float = option(
        "Step of the per-expert selection bias of loss-free balancing (arXiv 2408.15664); 0 is off.",
        0.0,
        ge=0,
    )
    output_z_loss_weight: float = option(
        "Weight of the z-loss on the output logits (arXiv 2204.02311); 0 is off.", 0.0, ge=0
    )
    mask_documents: bool = option(
        "Documents packed into one sample neither attend to nor predict one another.", True
    )
    reset_positions: bool = option("Rotary positions restart at each document of a packed sample.", False)
    expert_impl: str = option(
        "How tokens meet their experts: auto, loop (the reference), grouped (one after another), grouped_mm "
        "(torch 2.10 or later) or grouped_gemm (MegaBlocks' kernels); adapters have their own way.",
        "auto",
        one_of=EXPERT_IMPLS,
    )
    loss_chunk_size: int = option(
        "Tokens whose logits exist at one time while the loss is computed.", 1024, ge=1
    )
    init_method: str = option(
        "Weights' distribution: normal, trunc_normal (cut at 3 init_std) or kaiming_normal (fan-in).",
        "normal",
        one_of=INIT_METHODS,
    )
    init_std: float = option("Standard deviation of normal and trunc_normal.", 0.02, gt=0)
    init_residual_scaling: bool = option(
        "Divide the projections that write to the residual stream by sqrt(2 * n_layers) at init.", True
    )

    def __post_init__(self) -> None:
        self._check_types()
        check(self)

    def _check_types(self) -> None:
        for f in fields(self):
            value = getattr(self, f.name)
            assert not isinstance(f.type, str)
            if f.type in (float, float | None) and type(value) is int:
                setattr(self, f.name, float(value))
            elif not isinstance(value, f.type) or (isinstance(value, bool) and f.type is not bool):
                wanted = getattr(f.type, "__name__", str(f.type))
                raise ValueError(f"{f.name}: {value!r} is a {type(value).__name__}; must be {wanted}")

    def check(self) -> None:
        """What the options ask of each other."""
        d, h, kv = self.d_model, self.n_heads, self.n_kv_heads
        _require(d % h == 0, "n_heads", f"{h} does not divide d_model {d}")
        _require(
            self.head_dim % 2 == 0, "n_heads", f"d_model / n_heads = {self.head_dim} must be even for RoPE"
        )
        _require(h % kv == 0, "n_kv_heads", f"{kv} does not divide n_heads {h}")
        _require(
            self.top_k <= self.num_experts,
            "top_k",
            f"{self.top_k} is too large; must be at most num_experts, {self.num_experts}",
        )
        _require(
            self.loss_free_bias_rate == 0 or not self.is_dense,
            "loss_free_bias_rate",
            "must be 0 in a dense model (num_experts: 1), which has no router",
        )

    @property
    def head_dim(self) -> int:
        """Width of one attention head."""
        return self.d_model // self.n_heads

    @property
    def is_dense(self) -> bool:
        """True for one expert: no router, no balance loss."""
        return self.num_experts == 1

    @property
    def num_params(self) -> int:
        """All parameters, input embedding and output head included."""
        return self._count_params(experts=self.num_experts)

    @property
    def num_active_params(self) -> int:
        """Parameters that one token meets: `top_k` experts per layer, and everything outside the experts."""
        return self._count_params(experts=self.top_k)

    @property
    def num_active_params_non_embedding(self) -> int:
        """`num_active_params` without the input embedding, which is a lookup and costs no FLOPs."""
        return self.num_active_params - self.vocab_size * self.d_model

    def _count_params(self, experts: int) -> int:
        d = self.d_model
        attention = d * (d + 2 * self.n_kv_heads * self.head_dim) + d * d
        router = 0 if self.is_dense else self.num_experts * d
        block = 2 * d + attention + router + experts * 3 * self.ffn_hidden_size * d
        return self.n_layers * block + 2 * self.vocab_size * d + d

    def flops_per_token(self, seq_len: int, causal: bool = False) -> int:
        """Training FLOPs (forward and backward) per token of a sequence of `seq_len` tokens.

            6 * num_active_params_non_embedding + 12 * n_layers * d_model * seq_len

        is the convention of Composer and LLM Foundry (`flops_per_batch`): 2 FLOPs per multiply-add,
        the backward pass twice the forward, every query meeting every key. `causal=True` halves the
        attention term to 6 * n_layers * d_model * seq_len, the keys that a causal query really meets.
        Recomputed activations are not counted in either.
        """
        attention = 12 * self.n_layers * self.d_model * seq_len
        return 6 * self.num_active_params_non_embedding + (attention // 2 if causal else attention)

    @classmethod
    def from_dict(cls, values: Mapping[str, Any]) -> Self:
        """Build from plain values; raises ValueError for an unknown key, naming the nearest one."""
        names = [f.name for f in fields(cls)]
        for key in values:
            if key not in names:
                nearest = difflib.get_close_matches(str(key), names, n=1, cutoff=0.0)[0]
                raise ValueError(f"{key}: unknown model option; did you mean {nearest}?")
        return cls(**values)

    def to_dict(self) -> dict[str, Any]:
        """Plain values; `from_dict` gives the same config back."""
        return asdict(self)

    @classmethod
    def from_hf(cls, source: str | os.PathLike[str] | Mapping[str, Any]) -> Self:
        """Read a Hugging Face config of one of `hf.names.FAMILIES`, as transformers 4.38 and later write it.

        `source` is a model folder, a config.json or its parsed content. Keys left out take the Hugging
        Face class's defaults. DBRX's balance loss is in the megablocks convention, with which it was
        trained. Raises ValueError for anything that this package cannot compute.
        """
        from dbrx_train.model.hf import names

        if isinstance(source, Mapping):
            return cls(**names.config_values(source))
        path = Path(source) / "config.json" if Path(source).is_dir() else Path(source)
        content = _read_json(path)
        try:
            return cls.from_hf(content)
        except ValueError as error:
            raise ValueError(f"{path}: {error}") from None

    def to_hf(self) -> dict[str, Any]:
        """The content of a Hugging Face config.json, readable by transformers 4.38 and later.

        Raises ValueError for what the Hugging Face class cannot express.
        """
        from dbrx_train.model.hf import names

        return names.config_json(self)


def _require(condition: bool, name: str, message: str) -> None:
    if not condition:
        raise ValueError(f"{name}: {message}")


def _read_json(path: Path) -> Mapping[str, Any]:
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise ValueError(
            f"{path}: cannot be read ({error.strerror}); must be a Hugging Face config"
        ) from error
    except ValueError as error:
        raise ValueError(f"{path}: is not JSON ({error})") from error
    _require(isinstance(content, dict), str(path), "must hold a JSON object")
    return dict(content)
