"""Weights in 8 bits: a quarter of the memory, nearly the same model."""

from __future__ import annotations

import pytest
import torch

from dbrx_train.model.config import DbrxConfig
from dbrx_train.model.decoder import Dbrx
from dbrx_train.model.generation import generate
from dbrx_train.model.quantize import Int8Rows, quantize


@pytest.mark.parametrize("experts", [(16, 4), (1, 1)])
def test_a_quantized_model_is_a_quarter_and_says_nearly_the_same(experts: tuple[int, int]) -> None:
    config = DbrxConfig(
        d_model=64,
        n_layers=2,
        n_heads=4,
        n_kv_heads=2,
        ffn_hidden_size=112,
        num_experts=experts[0],
        top_k=experts[1],
        vocab_size=64,
        max_seq_len=64,
    )
    model = Dbrx(config, seed=1).eval()
    ids = torch.randint(64, (2, 32), generator=torch.Generator().manual_seed(0))
    before = sum(p.nbytes for p in model.parameters())
    assert 0 < quantize(model, ids) < 0.02
    assert sum(p.nbytes for p in model.parameters()) < 0.32 * before  # with scales, and what stays
    assert len(list(generate(model, ids[:1], 4, stop_ids=()))) == 4
    routers = [p for name, p in model.named_parameters() if "router" in name]
    assert all(p.dtype == torch.float32 for p in routers)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_no_value_is_further_off_than_half_a_step(dtype: torch.dtype) -> None:
    weight = torch.randn(9, 33).to(dtype)
    weight[4] = 0
    rows = Int8Rows()
    q, scale = rows.right_inverse(weight)
    assert q.dtype == torch.int8
    assert int(q.abs().max()) == 127
    off = (rows(q, scale).float() - weight.float()).abs()
    slack = 1.001 if dtype == torch.float32 else 2.1  # bfloat16 rounds scales and products too
    assert (off <= slack * scale.float() / 2 + 1e-12).all()
