"""Same weights, same numbers as transformers' DbrxForCausalLM."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from dbrx_train import Dbrx, DbrxConfig

transformers = pytest.importorskip("transformers")

RTOL = 1e-5

# name: (shape, batch, sequence length, factor on Wqkv so that the clip bites)
SHAPES: dict[str, tuple[dict[str, Any], int, int, float]] = {
    "kv1-k1-e4": (
        {"d_model": 48, "n_heads": 4, "n_kv_heads": 1, "ffn_hidden_size": 20, "num_experts": 4, "top_k": 1},
        2,
        13,
        1.0,
    ),
    "kv2-k2-e8-clip": (
        {"d_model": 64, "n_heads": 4, "n_kv_heads": 2, "ffn_hidden_size": 28, "num_experts": 8, "top_k": 2},
        3,
        37,
        40.0,
    ),
    "kv1-k4-e16": (
        {"d_model": 96, "n_heads": 6, "n_kv_heads": 1, "ffn_hidden_size": 40, "num_experts": 16, "top_k": 4},
        2,
        61,
        1.0,
    ),
    "kv2-k4-e16-clip-idle-experts": (
        {"d_model": 32, "n_heads": 2, "n_kv_heads": 2, "ffn_hidden_size": 56, "num_experts": 16, "top_k": 4},
        1,
        3,
        60.0,
    ),
}


def config_of(shape: dict[str, Any], **changes: Any) -> DbrxConfig:
    base = {
        "n_layers": 3,
        "vocab_size": 131,
        "max_seq_len": 64,
        "clip_qkv": 8.0,
        "balance_loss": "huggingface",
    }
    return DbrxConfig(**(base | shape | changes))


def hf_model(config: DbrxConfig, qkv_factor: float = 1.0) -> nn.Module:
    hf = transformers.DbrxConfig(**config.to_hf(), output_router_logits=True)
    torch.manual_seed(7)
    model: nn.Module = transformers.DbrxForCausalLM(hf)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "norm" in name and parameter.ndim == 1:
                parameter.normal_(1.0, 0.2)
            elif name.endswith("Wqkv.weight"):
                parameter.normal_(0, qkv_factor * 0.1)
            else:
                parameter.normal_(0, 0.1)
    return model


def assert_close(ours: Tensor | None, theirs: Tensor | None, name: str) -> None:
    assert ours is not None, name
    assert theirs is not None, name
    error = (ours - theirs).abs().max() / theirs.abs().max().clamp(min=1e-30)
    assert error <= RTOL, f"{name}: relative error {error:.2e}"


@pytest.mark.parametrize("expert_impl", ["loop", "grouped"])
@pytest.mark.parametrize("shape", SHAPES)
def test_logits_loss_and_every_gradient_equal_transformers(shape: str, expert_impl: str) -> None:
    values, batch, length, qkv_factor = SHAPES[shape]
    config = config_of(values, expert_impl=expert_impl, loss_chunk_size=11)
    theirs = hf_model(config, qkv_factor).train()
    ours = Dbrx(config).train()
    ours.load_state_dict(theirs.state_dict(), strict=True)
    tokens = torch.randint(config.vocab_size, (batch, length), generator=torch.Generator().manual_seed(1))
    labels = tokens.clone()
    labels[0, 1] = -100

    expected = theirs(input_ids=tokens, labels=labels, use_cache=False)
    got = ours(tokens, labels=labels, return_logits=True)
    expected.loss.backward()
    got.loss.backward()

    assert_close(got.logits, expected.logits, "logits")
    assert_close(got.loss, expected.loss, "loss")
    assert_close(got.losses["balance"], expected.aux_loss, "balance")
    gradients = dict(theirs.named_parameters())
    for name, parameter in ours.named_parameters():
        assert_close(parameter.grad, gradients[name].grad, name)
    if "clip" in shape:
        qkv = ours.transformer.blocks[0].norm_attn_norm.attn.Wqkv
        states = qkv(ours.transformer.blocks[0].norm_attn_norm.norm_1(ours.transformer.wte(tokens)))
        assert (states.abs() > 8).float().mean() > 0.01  # the clip really bites
    if "idle" in shape:
        assert (got.routing.tokens_per_expert == 0).any()


def test_state_dict_goes_both_ways_bit_for_bit() -> None:
    config = config_of(SHAPES["kv2-k2-e8-clip"][0])
    theirs = hf_model(config)
    ours = Dbrx(config)
    ours.load_state_dict(theirs.state_dict(), strict=True)
    for name, tensor in theirs.state_dict().items():
        assert torch.equal(tensor, ours.state_dict()[name]), name
    fresh = Dbrx(config, seed=3)
    theirs.load_state_dict(fresh.state_dict(), strict=True)
    for name, tensor in theirs.state_dict().items():
        assert torch.equal(tensor, fresh.state_dict()[name]), name


def test_folders_go_both_ways(tmp_path: Path) -> None:
    config = config_of(SHAPES["kv1-k4-e16"][0])
    tokens = torch.arange(20)[None]
    theirs = hf_model(config).eval()
    theirs.save_pretrained(tmp_path / "theirs", max_shard_size="200KB")
    ours = Dbrx.from_pretrained(tmp_path / "theirs")
    assert dataclasses.replace(ours.config, balance_loss="huggingface") == config
    assert_close(ours(tokens).logits, theirs(tokens).logits, "logits")

    ours.save_pretrained(tmp_path / "ours")
    back = transformers.DbrxForCausalLM.from_pretrained(tmp_path / "ours")
    for name, tensor in back.state_dict().items():
        assert torch.equal(tensor, ours.state_dict()[name]), name


def test_greedy_generation_equals_transformers() -> None:
    from dbrx_train.model.generation import generate

    config = config_of(SHAPES["kv2-k2-e8-clip"][0])
    theirs = hf_model(config).eval()
    theirs.config.output_router_logits = False
    ours = Dbrx(config).eval()
    ours.load_state_dict(theirs.state_dict())
    prompt = torch.tensor([[5, 9, 2, 77]])
    expected = theirs.generate(prompt, max_new_tokens=12, do_sample=False, eos_token_id=None, pad_token_id=0)
    got = torch.stack(list(generate(ours, prompt, max_new_tokens=12, stop_ids=())), dim=1)
    assert got.tolist() == expected[:, 4:].tolist()
