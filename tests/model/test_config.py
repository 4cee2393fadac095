"""DbrxConfig: arithmetic, validation and the Hugging Face form."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from omegaconf import OmegaConf

from dbrx_train import Dbrx, DbrxConfig

# name: d_model, heads, layers, total and active parameters in billions, as published
PUBLISHED = {
    "9b": (2048, 16, 24, 9.17, 2.83),
    "18b": (3072, 24, 22, 18.6, 5.5),
    "35b": (4096, 32, 24, 35.7, 10.3),
    "73b": (5120, 40, 32, 73.5, 20.7),
    "132b": (6144, 48, 40, 131.6, 36.5),
}
SMALL: dict[str, Any] = {
    "d_model": 32,
    "n_layers": 2,
    "n_heads": 4,
    "n_kv_heads": 2,
    "vocab_size": 64,
    "max_seq_len": 32,
    "ffn_hidden_size": 24,
    "num_experts": 4,
    "top_k": 2,
}


@pytest.mark.parametrize("name", PUBLISHED)
def test_published_family(name: str) -> None:
    d, heads, layers, total, active = PUBLISHED[name]
    config = DbrxConfig(d_model=d, n_heads=heads, n_layers=layers, ffn_hidden_size=d * 7 // 4)
    assert config.head_dim == 128
    assert config.num_params / 1e9 == pytest.approx(total, rel=5e-3)
    assert config.num_active_params / 1e9 == pytest.approx(active, rel=1e-2)
    with torch.device("meta"):
        model = Dbrx(config)
    assert sum(p.numel() for p in model.parameters()) == config.num_params


def test_released_dbrx_is_the_default() -> None:
    config = DbrxConfig()
    assert config.num_params == 131_596_523_520
    assert config.num_active_params / 1e9 == pytest.approx(36.47, abs=5e-3)
    assert config.num_active_params_non_embedding / 1e9 == pytest.approx(35.85, abs=5e-3)
    with torch.device("meta"):
        shapes = {name: tuple(t.shape) for name, t in Dbrx(config).state_dict().items()}
    assert len(shapes) == 323
    block = "transformer.blocks.39."
    assert shapes["transformer.wte.weight"] == shapes["lm_head.weight"] == (100_352, 6144)
    assert shapes["transformer.norm_f.weight"] == (6144,)
    assert {name.removeprefix(block): s for name, s in shapes.items() if name.startswith(block)} == {
        "norm_attn_norm.norm_1.weight": (6144,),
        "norm_attn_norm.norm_2.weight": (6144,),
        "norm_attn_norm.attn.Wqkv.weight": (8192, 6144),
        "norm_attn_norm.attn.out_proj.weight": (6144, 6144),
        "ffn.router.layer.weight": (16, 6144),
        "ffn.experts.mlp.w1": (172_032, 6144),
        "ffn.experts.mlp.v1": (172_032, 6144),
        "ffn.experts.mlp.w2": (172_032, 6144),
    }


def test_dense_has_no_router() -> None:
    config = DbrxConfig(**SMALL | {"num_experts": 1, "top_k": 1})
    with torch.device("meta"):
        names = [name for name, _ in Dbrx(config).named_parameters()]
    assert not any("router" in name for name in names)
    assert config.num_active_params == config.num_params


def test_flops_per_token() -> None:
    config = DbrxConfig(**SMALL)
    dense = 6 * (config.num_active_params - 64 * 32)
    assert config.flops_per_token(10) == dense + 12 * 2 * 32 * 10
    assert config.flops_per_token(10, causal=True) == dense + 6 * 2 * 32 * 10


@pytest.mark.parametrize(
    ("field", "value", "hint"),
    [
        ("d_model", -1, "at least 1"),
        ("d_model", 32.0, "must be int"),
        ("d_model", "32", "must be int"),
        ("n_layers", True, "must be int"),
        ("n_layers", 0, "at least 1"),
        ("n_heads", 5, "does not divide d_model"),
        ("n_heads", 32, "even"),
        ("n_kv_heads", 3, "does not divide n_heads"),
        ("top_k", 5, "at most num_experts, 4"),
        ("clip_qkv", 0.0, "must be positive"),
        ("rope_theta", float("nan"), "must be positive, not nan"),
        ("rope_theta", None, "must be float"),
        ("norm_eps", 0, "must be positive"),
        ("router_jitter", 1.0, "below 1"),
        ("balance_loss", "switch", "megablocks, huggingface, none"),
        ("balance_loss_weight", -0.1, "not be negative"),
        ("expert_impl", "triton", "auto, loop, grouped"),
        ("init_method", "xavier", "normal, trunc_normal, kaiming_normal"),
        ("init_std", 0.0, "must be positive"),
        ("mask_documents", 1, "must be bool"),
        ("loss_chunk_size", 0, "at least 1"),
    ],
)
def test_a_bad_field_is_named(field: str, value: Any, hint: str) -> None:
    with pytest.raises(ValueError, match=rf"^{field}: .*{hint}") as error:
        DbrxConfig(**SMALL | {field: value})
    assert "\n" not in str(error.value)


def test_loss_free_bias_needs_a_router() -> None:
    with pytest.raises(ValueError, match=r"^loss_free_bias_rate: .*dense"):
        DbrxConfig(num_experts=1, top_k=1, loss_free_bias_rate=0.001)


def test_every_field_is_documented() -> None:
    for f in DbrxConfig.__dataclass_fields__.values():
        assert f.metadata["doc"].endswith("."), f.name


def test_from_dict_inverts_to_dict_and_names_the_nearest_key() -> None:
    config = DbrxConfig(**SMALL, clip_qkv=None, init_method="kaiming_normal")
    assert DbrxConfig.from_dict(config.to_dict()) == config
    with pytest.raises(ValueError, match=r"^num_expert: .*num_experts\?"):
        DbrxConfig.from_dict({"num_expert": 4})


def test_omegaconf_takes_it_as_a_schema() -> None:
    merged = OmegaConf.merge(
        OmegaConf.structured(DbrxConfig), {**SMALL, "clip_qkv": None, "rope_theta": 10000}
    )
    assert OmegaConf.to_object(merged) == DbrxConfig(**SMALL, clip_qkv=None, rope_theta=10_000.0)


RELEASED_JSON = {
    "architectures": ["DbrxForCausalLM"],
    "attn_config": {"clip_qkv": 8, "kv_n_heads": 8, "model_type": "", "rope_theta": 500000},
    "d_model": 6144,
    "emb_pdrop": 0.0,
    "ffn_config": {
        "ffn_hidden_size": 10752,
        "model_type": "",
        "moe_jitter_eps": 0,
        "moe_loss_weight": 0.05,
        "moe_num_experts": 16,
        "moe_top_k": 4,
    },
    "initializer_range": 0.02,
    "max_seq_len": 32768,
    "model_type": "dbrx",
    "n_heads": 48,
    "n_layers": 40,
    "resid_pdrop": 0.0,
    "tie_word_embeddings": False,
    "vocab_size": 100352,
}


def test_from_hf_reads_the_released_config(tmp_path: Path) -> None:
    assert DbrxConfig.from_hf(RELEASED_JSON) == DbrxConfig()
    (tmp_path / "config.json").write_text(json.dumps(RELEASED_JSON))
    assert DbrxConfig.from_hf(tmp_path) == DbrxConfig.from_hf(str(tmp_path / "config.json")) == DbrxConfig()


def test_to_hf_is_inverted_by_from_hf_and_read_by_transformers() -> None:
    transformers = pytest.importorskip("transformers")
    config = DbrxConfig(**SMALL, clip_qkv=None, rope_theta=123.0, router_jitter=0.1, init_std=0.01)
    hf = config.to_hf()
    assert DbrxConfig.from_hf(hf) == config
    assert hf["rope_theta"] == 123.0
    loaded = transformers.DbrxConfig(**hf)
    assert loaded.attn_config.rope_theta == 123.0
    assert loaded.ffn_config.moe_num_experts == 4
    assert DbrxConfig.from_hf(loaded.to_dict()) == config


@pytest.mark.parametrize(
    ("change", "field"),
    [
        ({"num_experts": 1, "top_k": 1}, "num_experts"),
        ({"loss_free_bias_rate": 0.001}, "loss_free_bias_rate"),
        ({"norm_eps": 1e-6}, "norm_eps"),
    ],
)
def test_to_hf_refuses_what_hugging_face_cannot_say(change: dict[str, Any], field: str) -> None:
    with pytest.raises(ValueError, match=f"^{field}: "):
        DbrxConfig(**SMALL | change).to_hf()


@pytest.mark.parametrize(
    ("change", "name"),
    [
        ({"model_type": "llama"}, "model_type"),
        ({"resid_pdrop": 0.1}, "resid_pdrop"),
        ({"ffn_config": {"ffn_act_fn": {"name": "gelu"}}}, "ffn_config.ffn_act_fn.name"),
        ({"ffn_config": {"moe_num_experts": 1}}, "num_experts"),
    ],
)
def test_from_hf_refuses_what_it_cannot_compute(change: dict[str, Any], name: str) -> None:
    with pytest.raises(ValueError, match=f"^{name}: "):
        DbrxConfig.from_hf(RELEASED_JSON | change)


def test_from_hf_names_the_file(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"config\.json: cannot be read"):
        DbrxConfig.from_hf(tmp_path)
    (tmp_path / "config.json").write_text("{")
    with pytest.raises(ValueError, match=r"config\.json: is not JSON"):
        DbrxConfig.from_hf(tmp_path)
