"""The Hugging Face classes that this decoder computes, as tables: their config.json and their tensors.

Each of our parameters is one or several of their tensors, one below the other.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

from dbrx_train.model.config import DbrxConfig
from dbrx_train.model.hf.quantized import check_method

__all__ = ["Family", "Part", "Table", "config_json", "config_values", "family_of", "identity", "table"]


@dataclass(frozen=True)
class Part:
    """Some rows of one of our parameters, which are a whole tensor elsewhere."""

    name: str
    """There."""
    rows: int
    """Here."""
    transposed: bool = False
    """Our rows are its columns."""

    def shape(self, ours: tuple[int, ...]) -> tuple[int, ...]:
        """Its shape there, if the whole parameter's is ``ours`` here."""
        shape = self.rows, *ours[1:]
        return shape[::-1] if self.transposed else shape


Table = Mapping[str, tuple[Part, ...]]
"""Our parameter's name -> its parts from top to bottom."""


@dataclass(frozen=True)
class Family:
    """One model class of transformers."""

    model_type: str
    architecture: str
    fields: Mapping[str, tuple[str, Any]]
    """Key in config.json, with its section -> our option, and the class's default."""
    fixed: Mapping[str, Any]
    """Our options that the class has no key for, and what it always does."""
    required: Mapping[str, tuple[Any, ...]]
    """Key in config.json -> the values of it that we can compute; the first is written."""
    adopted: Mapping[str, Any]
    """Our options that take these values when a config is read, and may have others when one is written."""
    parts: Callable[[DbrxConfig, str, int], tuple[Part, ...]]
    """(config, our parameter's name, its rows) -> its parts."""


def _dbrx_parts(config: DbrxConfig, name: str, rows: int) -> tuple[Part, ...]:
    return (Part(name, rows),)


_EITHER, _ZERO = (False, None, True), (0.0, None)
_SILU = ("silu", None)

DBRX = Family(
    model_type="dbrx",
    architecture="DbrxForCausalLM",
    fields={
        "d_model": ("d_model", 2048),
        "n_layers": ("n_layers", 24),
        "n_heads": ("n_heads", 16),
        "vocab_size": ("vocab_size", 32000),
        "max_seq_len": ("max_seq_len", 2048),
        "initializer_range": ("init_std", 0.02),
        "attn_config.kv_n_heads": ("n_kv_heads", 1),
        "attn_config.rope_theta": ("rope_theta", 10_000.0),
        "attn_config.clip_qkv": ("clip_qkv", None),
        "ffn_config.ffn_hidden_size": ("ffn_hidden_size", 3584),
        "ffn_config.moe_num_experts": ("num_experts", 4),
        "ffn_config.moe_top_k": ("top_k", 1),
        "ffn_config.moe_jitter_eps": ("router_jitter", None),
        "ffn_config.moe_loss_weight": ("balance_loss_weight", 0.01),
        "ffn_config.moe_normalize_expert_weights": ("normalize_expert_weights", 1.0),
    },
    fixed={"norm": "layernorm", "norm_eps": 1e-5},
    required={
        "tie_word_embeddings": _EITHER,
        "ffn_config.ffn_act_fn.name": _SILU,
        "resid_pdrop": _ZERO,
        "emb_pdrop": _ZERO,
        "attn_config.attn_pdrop": _ZERO,
    },
    adopted={},
    parts=_dbrx_parts,
)

# Our parameter -> theirs; several are stacked, a layer's experts in their order.
_MIXTRAL_TENSORS = {
    "transformer.wte.weight": ["model.embed_tokens.weight"],
    "norm_attn_norm.norm_1.weight": ["model.layers.{layer}.input_layernorm.weight"],
    "norm_attn_norm.norm_2.weight": ["model.layers.{layer}.post_attention_layernorm.weight"],
    "norm_attn_norm.attn.Wqkv.weight": [f"model.layers.{{layer}}.self_attn.{x}_proj.weight" for x in "qkv"],
    "norm_attn_norm.attn.out_proj.weight": ["model.layers.{layer}.self_attn.o_proj.weight"],
    "ffn.router.layer.weight": ["model.layers.{layer}.block_sparse_moe.gate.weight"],
    "ffn.experts.mlp.w1": ["model.layers.{layer}.block_sparse_moe.experts.{expert}.w1.weight"],
    "ffn.experts.mlp.v1": ["model.layers.{layer}.block_sparse_moe.experts.{expert}.w3.weight"],
    "ffn.experts.mlp.w2": ["model.layers.{layer}.block_sparse_moe.experts.{expert}.w2.weight"],
    "transformer.norm_f.weight": ["model.norm.weight"],
    "lm_head.weight": ["lm_head.weight"],
}


def _mixtral_parts(config: DbrxConfig, name: str, rows: int) -> tuple[Part, ...]:
    layer, inner = re.fullmatch(r"(?:transformer\.blocks\.(\d+)\.)?(.*)", name).groups()  # type: ignore[union-attr]
    templates = _MIXTRAL_TENSORS[inner]
    if "{expert}" in templates[0]:
        names = [templates[0].format(layer=layer, expert=e) for e in range(config.num_experts)]
    else:
        names = [template.format(layer=layer) for template in templates]
    heads = config.n_heads, config.n_kv_heads, config.n_kv_heads
    sizes = [h * config.head_dim for h in heads] if len(templates) == 3 else [rows // len(names)] * len(names)
    return tuple(Part(name, size, inner.endswith("mlp.w2")) for name, size in zip(names, sizes, strict=True))


MIXTRAL = Family(
    model_type="mixtral",
    architecture="MixtralForCausalLM",
    fields={
        "hidden_size": ("d_model", 4096),
        "num_hidden_layers": ("n_layers", 32),
        "num_attention_heads": ("n_heads", 32),
        "num_key_value_heads": ("n_kv_heads", 8),
        "vocab_size": ("vocab_size", 32000),
        "max_position_embeddings": ("max_seq_len", 131_072),
        "initializer_range": ("init_std", 0.02),
        "rope_theta": ("rope_theta", 1e6),
        "rms_norm_eps": ("norm_eps", 1e-5),
        "intermediate_size": ("ffn_hidden_size", 14_336),
        "num_local_experts": ("num_experts", 8),
        "num_experts_per_tok": ("top_k", 2),
        "router_jitter_noise": ("router_jitter", 0.0),
        "router_aux_loss_coef": ("balance_loss_weight", 0.001),
    },
    fixed={"norm": "rmsnorm", "clip_qkv": None, "normalize_expert_weights": 1.0},
    required={
        "tie_word_embeddings": _EITHER,
        "hidden_act": _SILU,
        "attention_dropout": _ZERO,
        "sliding_window": (None,),
    },
    adopted={"balance_loss": "huggingface"},  # the convention in which its weight is given
    parts=_mixtral_parts,
)

FAMILIES = (DBRX, MIXTRAL)


def config_values(hf: Mapping[str, Any]) -> dict[str, Any]:
    """Our options for a config.json of transformers 4.38 to 5.x.

    Raises:
        ValueError: beginning with its key, for what we cannot compute.
    """
    kind = hf.get("model_type", "dbrx")
    families = {family.model_type: family for family in FAMILIES}
    if not isinstance(kind, str) or kind not in families:
        raise ValueError(f"model_type: {kind!r} is not supported; must be one of {', '.join(families)}")
    family = families[kind]
    check_method(hf)
    for key, accepted in family.required.items():
        value = _get(hf, key)
        if value not in accepted:
            raise ValueError(f"{key}: {value!r} is not supported; must be {accepted[0]!r}")
    values = {ours: _number(hf, key, default) for key, (ours, default) in family.fields.items()}
    values |= dict(family.fixed) | dict(family.adopted)
    values["rope_theta"] = _rope_theta(hf, family)
    values["router_jitter"] = values["router_jitter"] or 0.0
    width = values["d_model"] / values["n_heads"]
    if hf.get("head_dim") not in (None, width):
        raise ValueError(f"head_dim: {hf['head_dim']} is not supported; must be width / heads")
    if values["num_experts"] == 1:
        raise ValueError("num_experts: must be above 1, as the class always has a router")
    return values


def config_json(config: DbrxConfig) -> dict[str, Any]:
    """The content of a config.json that transformers 4.38 and later read.

    Raises:
        ValueError: beginning with our option's name, for what the Hugging Face class cannot express.
    """
    family = family_of(config)
    hf: dict[str, Any] = {"architectures": [family.architecture], "model_type": family.model_type}
    for key, accepted in family.required.items():
        _put(hf, key, accepted[0])
    for key, (ours, _) in family.fields.items():
        weight = ours == "balance_loss_weight"
        _put(hf, key, _balance_weight(config, family) if weight else getattr(config, ours))
    hf["rope_theta"] = config.rope_theta  # transformers 5 ignores the one in attn_config
    # The first with DBRX. Without one, 4.57.6 takes every large tokenizer for a broken one of Mistral's.
    hf["transformers_version"] = "4.40.0"
    return hf


def _balance_weight(config: DbrxConfig, family: Family) -> float:
    """In the convention in which the class's is read."""
    if config.balance_loss == "none":
        return 0.0
    if config.balance_loss == "megablocks" and family.adopted.get("balance_loss") == "huggingface":
        return config.balance_loss_weight / config.top_k  # that loss is top_k at balance, not 1
    return config.balance_loss_weight


def family_of(config: DbrxConfig) -> Family:
    """The class with the norm of ``config``.

    Raises:
        ValueError: it cannot express the rest; names the option.
    """
    family = next(family for family in FAMILIES if family.fixed["norm"] == config.norm)
    name = family.architecture
    if config.is_dense:
        raise ValueError(f"num_experts: {name} has no dense form; must be above 1")
    if config.loss_free_bias_rate > 0:
        raise ValueError(f"loss_free_bias_rate: {name} has no selection bias; must be 0")
    for option, value in family.fixed.items():
        if getattr(config, option) != value:
            raise ValueError(
                f"{option}: {getattr(config, option)} is not what {name} computes; must be {value}"
            )
    return family


def table(config: DbrxConfig, shapes: Mapping[str, tuple[int, ...]]) -> Table:
    """Where the parameters of ``shapes`` are in a Hugging Face folder; raises as ``family_of``."""
    family = family_of(config)
    return {name: family.parts(config, name, shape[0]) for name, shape in shapes.items()}


def identity(shapes: Mapping[str, tuple[int, ...]]) -> Table:
    """Every tensor is its own."""
    return {name: (Part(name, shape[0]),) for name, shape in shapes.items()}


def _rope_theta(hf: Mapping[str, Any], family: Family) -> Any:
    """The rotary base: in its section, or where transformers 5 puts it for every class."""
    key, default = next(
        (key, default) for key, (ours, default) in family.fields.items() if ours == "rope_theta"
    )
    rope = hf.get("rope_parameters") or hf.get("rope_scaling") or {}
    if not isinstance(rope, Mapping):
        raise ValueError(f"rope_scaling: {rope!r} is not supported; must be a JSON object")
    kind = rope.get("rope_type", rope.get("type", "default"))
    if kind != "default":
        raise ValueError(f"rope_parameters: {kind!r} is not supported; must be 'default'")
    own, common = _get(hf, key), rope.get("rope_theta", hf.get("rope_theta"))
    if own is not None and common is not None and own != common:
        raise ValueError(
            f"{key}: {own}, but rope_theta is {common} elsewhere in the file; both must be what the model "
            f"was trained with"
        )
    return next((value for value in (own, common) if value is not None), default)


def _number(hf: Mapping[str, Any], key: str, default: Any) -> Any:
    """The value at a key, of the kind of its default."""
    value = _get(hf, key, default)
    if isinstance(default, int):
        if type(value) is not int or value < 1:
            raise ValueError(f"{key}: {value!r} is not supported; must be a whole number above 0")
    elif value is not None and type(value) not in (int, float):
        raise ValueError(f"{key}: {value!r} is not supported; must be a number")
    return value


def _get(hf: Mapping[str, Any], key: str, default: Any = None) -> Any:
    """The value at a dotted key; ``default`` where it or its section is absent."""
    *sections, last = key.split(".")
    for section in sections:
        inner = hf.get(section)
        if not isinstance(inner, Mapping | None):
            raise ValueError(f"{key}: {section} is {inner!r}; must be a JSON object")
        hf = inner or {}
    return hf.get(last, default)


def _put(hf: dict[str, Any], key: str, value: Any) -> None:
    *sections, last = key.split(".")
    for section in sections:
        hf = hf.setdefault(section, {})
    hf[last] = value
