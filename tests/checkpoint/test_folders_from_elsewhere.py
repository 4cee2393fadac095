"""Hugging Face folders as others write them: buffers, tied heads, weights in float8 with scales."""

from __future__ import annotations

import json
import math
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from dbrx_train import Dbrx
from dbrx_train.checkpoint.huggingface import export, import_folder
from dbrx_train.checkpoint.verify import verify
from dbrx_train.checkpoint.weights import load_model, open_weights

transformers = pytest.importorskip("transformers")
IDS = torch.randint(131, (2, 17), generator=torch.Generator().manual_seed(1))
FILE = "model.safetensors"


def nobody(line: str) -> None:
    raise AssertionError(line)


def mixtral(folder: Path, tied: bool = False) -> torch.nn.Module:
    """A random Mixtral, written to ``folder``."""
    config = transformers.MixtralConfig(
        hidden_size=48,
        num_attention_heads=4,
        num_key_value_heads=2,
        num_hidden_layers=2,
        vocab_size=131,
        max_position_embeddings=64,
        intermediate_size=40,
        num_local_experts=4,
        num_experts_per_tok=2,
        tie_word_embeddings=tied,
    )
    torch.manual_seed(3)
    model: torch.nn.Module = transformers.MixtralForCausalLM(config).eval()
    model.save_pretrained(folder)
    return model


def edit(folder: Path, change: Callable[[dict[str, Tensor]], object]) -> None:
    tensors = load_file(folder / FILE)
    change(tensors)
    save_file(tensors, folder / FILE, metadata={"format": "pt"})


def logits(model: torch.nn.Module) -> Tensor:
    with torch.no_grad():
        return model(IDS).logits


def test_a_tied_head_is_the_embedding_once_more(tmp_path: Path) -> None:
    theirs = mixtral(tmp_path / "in", tied=True)
    assert "lm_head.weight" not in load_file(tmp_path / "in" / FILE)
    for ours in (load_model(open_weights(tmp_path / "in", nobody)), Dbrx.from_pretrained(tmp_path / "in")):
        torch.testing.assert_close(logits(ours), logits(theirs), rtol=1e-5, atol=1e-6)
        assert ours.lm_head.weight is not ours.transformer.wte.weight
    assert verify(tmp_path / "in")
    import_folder(tmp_path / "in", tmp_path / "imported")
    export(tmp_path / "imported", tmp_path / "out", torch.float32, nobody)
    assert json.loads((tmp_path / "out" / "config.json").read_text())["tie_word_embeddings"] is False
    again = transformers.MixtralForCausalLM.from_pretrained(tmp_path / "out")
    torch.testing.assert_close(logits(again), logits(theirs), rtol=1e-5, atol=1e-6)
    # As transformers does, whatever head is there beside the tie
    edit(tmp_path / "in", lambda tensors: tensors.update({"lm_head.weight": torch.zeros(131, 48)}))
    ours = load_model(open_weights(tmp_path / "in", nobody))
    torch.testing.assert_close(logits(ours), logits(theirs), rtol=1e-5, atol=1e-6)


def test_without_a_tie_a_head_is_missed(tmp_path: Path) -> None:
    mixtral(tmp_path)
    edit(tmp_path, lambda tensors: tensors.pop("lm_head.weight"))
    with pytest.raises(ValueError, match=r"missing lm_head.weight$"):
        open_weights(tmp_path, nobody)


def test_buffers_of_rotary_embeddings_are_passed_over(tmp_path: Path) -> None:
    theirs = mixtral(tmp_path)
    buffers = {f"model.layers.{i}.self_attn.rotary_emb.inv_freq": torch.ones(6) for i in range(2)}
    edit(tmp_path, lambda tensors: tensors.update(buffers))
    ours = load_model(open_weights(tmp_path, nobody))
    torch.testing.assert_close(logits(ours), logits(theirs), rtol=1e-5, atol=1e-6)
    edit(tmp_path, lambda tensors: tensors.update({"model.layers.0.self_attn.rotary": torch.ones(6)}))
    with pytest.raises(ValueError, match=r"unexpected model.layers.0.self_attn.rotary$"):
        open_weights(tmp_path, nobody)


BLOCK = 32
FLOAT8 = torch.float8_e4m3fn


def spread(scale: Tensor, shape: torch.Size, block: int) -> Tensor:
    """Scales of blocks, one for each value."""
    return scale.repeat_interleave(block, 0).repeat_interleave(block, 1)[: shape[0], : shape[1]]


def quantize(weight: Tensor, form: str) -> tuple[Tensor, Tensor, Tensor]:
    """A weight in float8, its scales, and what both mean."""
    rows, columns = weight.shape
    if form == "blocks":
        scale = torch.rand(math.ceil(rows / BLOCK), math.ceil(columns / BLOCK)) + 0.5
        each = spread(scale, weight.shape, BLOCK)
    elif form == "rows":
        scale = torch.rand(rows, 1) + 0.5
        each = scale.expand(rows, columns)
    else:
        scale = torch.rand(()) + 0.5
        each = scale.expand(rows, columns)
    small = (weight / each).to(FLOAT8)
    return small, scale, small.float() * each


@pytest.mark.parametrize("form", ["blocks", "rows", "one"])
def test_weights_in_float8_are_what_their_scales_make_of_them(tmp_path: Path, form: str) -> None:
    theirs = mixtral(tmp_path)
    meant = theirs.state_dict()
    ending = "_scale_inv" if form == "blocks" else "_scale"

    def shrink(tensors: dict[str, Tensor]) -> None:
        for name in [name for name in tensors if "experts" in name or "_proj" in name]:
            tensors[name], scale, full = quantize(tensors[name], form)
            tensors[f"{name}{ending}"] = scale.contiguous()
            tensors[f"{name.removesuffix('weight')}input_scale"] = torch.ones(())
            meant[name].copy_(full)

    edit(tmp_path, shrink)
    config = json.loads((tmp_path / "config.json").read_text())
    config["quantization_config"] = {"quant_method": "fp8", "weight_block_size": [BLOCK, BLOCK]}
    (tmp_path / "config.json").write_text(json.dumps(config))
    weights = open_weights(tmp_path, nobody)
    ours = load_model(weights)
    torch.testing.assert_close(logits(ours), logits(theirs), rtol=1e-5, atol=1e-6)
    assert weights.dtypes["transformer.blocks.0.ffn.experts.mlp.w2"] == torch.bfloat16
    assert verify(tmp_path)
    if form == "blocks":
        edit(tmp_path, lambda tensors: [tensors.pop(name) for name in [*tensors] if name.endswith("_inv")])
        with pytest.raises(ValueError, match="is float8_e4m3fn without scales, must be one of"):
            open_weights(tmp_path, nobody)
