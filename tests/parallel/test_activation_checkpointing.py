"""What is computed again gives the same gradients, and costs what it is said to cost."""

from __future__ import annotations

import gc
from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.utils.flop_counter import FlopCounterMode

from dbrx_train.model.config import ACTIVATION_CHECKPOINTING, DbrxConfig
from dbrx_train.model.decoder import Dbrx
from dbrx_train.parallel import checkpoint_activations
from dbrx_train.plan.memory import _work

CONFIG = DbrxConfig(
    d_model=32,
    n_layers=2,
    n_heads=4,
    n_kv_heads=2,
    ffn_hidden_size=56,
    num_experts=4,
    top_k=2,
    vocab_size=101,
    max_seq_len=64,
    router_jitter=0.1,  # drawn anew, it would change the gradients
)


def step(what: str) -> tuple[dict[str, Tensor], int, int]:
    """Gradients, FLOPs and bytes that are kept for the backward pass."""
    model = Dbrx(CONFIG, seed=1)
    checkpoint_activations(model, what)
    ids = torch.randint(101, (2, 48), generator=torch.Generator().manual_seed(0))
    torch.manual_seed(5)
    kept: dict[Any, int] = {}

    def keep(tensor: Tensor) -> Tensor:
        storage = tensor.untyped_storage()
        kept[storage.data_ptr()] = storage.nbytes()
        return tensor

    with FlopCounterMode(display=False) as flops:
        with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
            loss = model(ids, labels=ids).loss
        assert loss is not None
        loss.backward()
    grads = {name: p.grad for name, p in model.named_parameters() if p.grad is not None}
    return grads, flops.get_total_flops(), sum(kept.values())


def test_every_gradient_stays_and_products_are_repeated_as_said() -> None:
    expected, flops, kept = step("none")
    costs = {}
    for what in ACTIVATION_CHECKPOINTING:
        grads, costs[what], saved = step(what)
        assert grads.keys() == expected.keys()
        assert all(torch.equal(grads[name], expected[name]) for name in expected), what
        assert saved < kept or what == "none"
    heads = CONFIG.d_model + 2 * CONFIG.n_kv_heads * CONFIG.head_dim
    tokens, layers = 2 * 48, CONFIG.n_layers
    attention = 2 * tokens * CONFIG.d_model * (heads + CONFIG.d_model) + 2 * 2 * 2 * 48 * 48 * CONFIG.d_model
    assert costs["none"] == flops
    assert costs["norm_attn_norm"] - flops <= attention * layers
    assert flops < costs["norm_attn_norm"] < costs["full"]
    # Nobody asks for the experts' answers then, and so their last product is not computed again.
    router, two_products = CONFIG.d_model * CONFIG.num_experts, 2 * CONFIG.d_model * CONFIG.ffn_hidden_size
    ffn = 2 * tokens * (router + CONFIG.top_k * two_products)
    assert costs["full"] == costs["full_keep_dispatched"] == costs["norm_attn_norm"] + layers * ffn
    assert costs["selective"] - flops < 0.01 * flops


def kept_per_token(config: DbrxConfig, what: str) -> float:
    """Bytes that the blocks keep for their backward pass, per token."""
    model = Dbrx(config, seed=1)
    checkpoint_activations(model, what)
    kept: dict[int, Tensor] = {}  # held, so that no address is used twice
    weights = {p.untyped_storage().data_ptr() for p in model.parameters()}

    def keep(tensor: Tensor) -> Tensor:
        if tensor.untyped_storage().data_ptr() not in weights:
            kept[tensor.untyped_storage().data_ptr()] = tensor
        return tensor

    ids = torch.randint(101, (2, 64), generator=torch.Generator().manual_seed(0))
    with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        hidden, _ = model.transformer(ids)
    assert hidden.requires_grad
    return sum(tensor.untyped_storage().nbytes() for tensor in kept.values()) / ids.numel()


@pytest.mark.parametrize(
    "what", ["none", "full", "norm_attn_norm"]
)  # the fourth keeps its own where no hook sees
def test_what_a_block_keeps_is_what_the_estimate_says(what: str) -> None:
    config = replace(CONFIG, d_model=64, ffn_hidden_size=112, router_jitter=0.0)
    few, many = (kept_per_token(replace(config, n_layers=layers), what) for layers in (2, 6))
    estimate = _work(config, 1, 4, what, spread=False, skew=1.0).kept
    assert (many - few) / 4 == pytest.approx(estimate, rel=0.15)


@pytest.mark.parametrize("num_experts", [1, 4])
@pytest.mark.parametrize("what", ACTIVATION_CHECKPOINTING)
def test_a_step_leaves_nothing_behind(what: str, num_experts: int) -> None:
    config = replace(CONFIG, num_experts=num_experts, top_k=1)
    model = Dbrx(config, seed=1)
    checkpoint_activations(model, what)
    ids = torch.zeros(1, 61, dtype=torch.int64)  # of a length that no other tensor has
    for _ in range(2):
        loss = model(ids, labels=ids).loss
        assert loss is not None
        loss.backward()
        del loss
    gc.collect()
    left = [o for o in gc.get_objects() if type(o) is Tensor and 61 in o.shape and o is not ids]
    assert not left


def test_more_experts_keep_no_more_of_a_token() -> None:
    few, many = (
        kept_per_token(replace(CONFIG, num_experts=experts, router_jitter=0.0), "none") for experts in (4, 16)
    )
    scores = 12 * 4 * CONFIG.n_layers  # a float32 for each further expert
    assert many - few <= 4 * scores  # logits, probabilities and what the softmax keeps


def test_an_unknown_choice_is_refused() -> None:
    with pytest.raises(ValueError, match="'some' is not one of none, full, full_keep_dispatched, selective"):
        checkpoint_activations(Dbrx(CONFIG, seed=1), "some")
