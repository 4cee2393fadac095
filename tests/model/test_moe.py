"""Router, experts and the MoE layer."""

from __future__ import annotations

import importlib.util
import math
import sys
import types
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor
from torch.nn import functional as F

from dbrx_train import DbrxConfig, MoE
from dbrx_train.model.config import EXPERT_IMPLS
from dbrx_train.model.moe import experts, load_balancing
from dbrx_train.model.moe.router import Router, Routing, count_tokens


def config_of(**changes: Any) -> DbrxConfig:
    base = {"d_model": 16, "n_heads": 2, "n_kv_heads": 1, "ffn_hidden_size": 8, "num_experts": 4, "top_k": 2}
    return DbrxConfig(**(base | changes))


def routing_of(probs: Tensor, expert_ids: Tensor, token_mask: Tensor | None = None) -> Routing:
    weights = probs.gather(-1, expert_ids)
    counts = count_tokens(expert_ids, probs.shape[-1], token_mask)
    return Routing(probs.log(), probs, weights, expert_ids, counts)


def run_experts(
    impl: str, counts: list[int], width: int, hidden: int, dtype: torch.dtype, weighted: bool = True
) -> list[Tensor]:
    """Outputs, and gradients of tokens, weights of tokens (if ``weighted``) and matrices."""
    generator = torch.Generator().manual_seed(0)
    tokens = sum(counts)
    shapes = [(tokens, width), (tokens,), *[(len(counts), hidden, width)] * 3]
    x, weight, *matrices = (torch.randn(s, generator=generator).to(dtype).requires_grad_() for s in shapes)
    y = experts.EXPERT_FNS[impl](x, weight if weighted else None, *matrices, torch.tensor(counts))
    cotangent = torch.randn(y.shape, generator=generator).to(dtype)
    inputs = [x, *([weight] if weighted else []), *matrices]
    return [y, *torch.autograd.grad(y, inputs, cotangent)]


def assert_experts_agree(got: list[Tensor], expected: list[Tensor], dtype: torch.dtype) -> None:
    # A weight's gradient sums products with y, which bfloat16 has rounded: its error is relative to these.
    least = max(1.0, float(expected[0].abs().max())) if expected[0].numel() else 1.0
    for a, b in zip(got, expected, strict=True):
        assert a.dtype == dtype
        scale = b.abs().max().clamp(min=1.0 if dtype == torch.float32 else least) if b.numel() else 1.0
        atol = 1e-5 if dtype == torch.float32 else 2e-2
        torch.testing.assert_close(a / scale, b / scale, rtol=0, atol=atol)


@settings(max_examples=40, deadline=None)
@given(
    counts=st.lists(st.sampled_from([0, 0, 1, 2, 5, 16, 17, 40]), min_size=1, max_size=8),
    width=st.sampled_from([6, 16]),
    hidden=st.sampled_from([5, 24]),
    dtype=st.sampled_from([torch.float32, torch.bfloat16]),
    weighted=st.booleans(),
)
def test_expert_backends_agree(
    counts: list[int], width: int, hidden: int, dtype: torch.dtype, weighted: bool
) -> None:
    expected = run_experts("loop", counts, width, hidden, dtype, weighted)
    got = run_experts("grouped", counts, width, hidden, dtype, weighted)
    assert_experts_agree(got, expected, dtype)
    for w in got[-3:]:
        assert not w[torch.tensor(counts) == 0].any()
    again = run_experts("grouped", counts, width, hidden, dtype, weighted)
    assert all(torch.equal(a, b) for a, b in zip(got, again, strict=True))


def test_frozen_matrices_get_no_gradients_and_tokens_the_same() -> None:
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(7, 16, generator=generator, dtype=torch.float64).requires_grad_()
    matrices = torch.randn(3, 4, 8, 16, generator=generator, dtype=torch.float64).unbind()
    counts = torch.tensor([2, 0, 4, 1])
    grads = [
        torch.autograd.grad(experts.EXPERT_FNS[impl](x, None, *matrices, counts).square().sum(), x)[0]
        for impl in ("loop", "grouped")
    ]
    torch.testing.assert_close(*grads)


def test_loop_is_the_formula() -> None:
    x, w1, v1, w2 = torch.randn(3, 4), *torch.randn(3, 2, 5, 4)
    weight = torch.tensor([0.5, 2.0, 3.0])
    y = experts.loop(x, weight, w1, v1, w2, torch.tensor([1, 2]))
    for row, e in ((0, 0), (1, 1), (2, 1)):
        expected = weight[row] * (F.silu(w1[e] @ x[row]) * (v1[e] @ x[row])) @ w2[e]
        torch.testing.assert_close(y[row], expected)


def by_segment(a: Tensor, b: Tensor, sizes: list[int]) -> Tensor:
    """Rows of a times the matrices of b, or, where b is rows too, the product of each segment's rows."""
    if b.dim() == 3:
        return torch.cat([rows @ b[e] for e, rows in enumerate(a.split(sizes))])
    return torch.stack([left @ right for left, right in zip(a.split(sizes, 1), b.split(sizes), strict=True)])


def grouped_mm(a: Tensor, b: Tensor, *, offs: Tensor) -> Tensor:
    """What torch 2.8 documents, for older ones."""
    assert offs.dtype == torch.int32
    return by_segment(a, b, offs.diff(prepend=offs.new_zeros(1)).tolist())


def gmm(a: Tensor, b: Tensor, sizes: Tensor, trans_a: bool = False, trans_b: bool = False) -> Tensor:
    """What grouped_gemm's kernels compute and insist on, which run on a GPU only."""
    assert sizes.dtype == torch.int64
    assert sizes.device.type == "cpu"
    assert a.is_contiguous()
    assert b.is_contiguous()
    return by_segment(a.T if trans_a else a, b.mT if trans_b else b, sizes.tolist())


@pytest.mark.parametrize("impl", ["grouped_mm", "grouped_gemm"])
@pytest.mark.parametrize("counts", [[3, 0, 7, 1], [0, 0, 11, 0], [0, 4, 0, 0]])
def test_grouped_products_are_called_right(
    monkeypatch: pytest.MonkeyPatch, impl: str, counts: list[int]
) -> None:
    if not hasattr(F, "grouped_mm"):
        monkeypatch.setattr(F, "grouped_mm", grouped_mm, raising=False)
    kernels = types.ModuleType("grouped_gemm.backend")
    kernels.gmm = gmm
    monkeypatch.setitem(sys.modules, "grouped_gemm", types.ModuleType("grouped_gemm"))
    monkeypatch.setitem(sys.modules, "grouped_gemm.backend", kernels)
    for weighted in (False, True):
        got = run_experts(impl, counts, 16, 24, torch.float32, weighted)
        expected = run_experts("loop", counts, 16, 24, torch.float32, weighted)
        assert_experts_agree(got, expected, torch.float32)


def test_backends_that_are_not_there_are_named() -> None:
    if not hasattr(F, "grouped_mm"):
        with pytest.raises(ValueError, match=r"expert_impl: torch .* has no grouped_mm; 2.10 or later has"):
            MoE(config_of(expert_impl="grouped_mm"))
    if importlib.util.find_spec("grouped_gemm") is None:
        with pytest.raises(ValueError, match=r"expert_impl: grouped_gemm is not installed; docs/install\.md"):
            MoE(config_of(expert_impl="grouped_gemm"))


def test_the_operators_keep_torchs_rules() -> None:
    x, weight = torch.randn(9, 6, requires_grad=True), torch.randn(9, requires_grad=True)
    matrices = torch.randn(3, 3, 5, 6).requires_grad_().unbind()
    operator = torch.ops.dbrx_train.grouped_glu.default
    torch.library.opcheck(operator, (x, weight, *matrices, torch.tensor([4, 0, 5]), "grouped", True))


def test_every_configurable_backend_exists() -> None:
    assert set(experts.EXPERT_FNS) == set(EXPERT_IMPLS)


@pytest.mark.parametrize("impl", ["loop", "grouped"])
@pytest.mark.parametrize("dense", [False, True])
def test_moe_equals_the_sum_over_chosen_experts(impl: str, dense: bool) -> None:
    config = config_of(expert_impl=impl, **({"num_experts": 1, "top_k": 1} if dense else {}))
    moe = MoE(config)
    x = torch.randn(2, 3, 16)
    y, routing = moe(x)
    assert y.shape == x.shape
    assert (routing is None) == dense
    w1, v1, w2 = (w.view(-1, 8, 16) for w in (moe.experts.mlp.w1, moe.experts.mlp.v1, moe.experts.mlp.w2))
    for token in range(6):
        row = x.view(6, 16)[token]
        chosen = [(0, 1.0)]
        if routing is not None:
            p = (moe.router.layer.weight @ row).softmax(-1)
            top = p.topk(2)
            chosen = [(e, v / top.values.sum()) for e, v in zip(top.indices, top.values, strict=True)]
        expected = sum(w * ((F.silu(w1[e] @ row) * (v1[e] @ row)) @ w2[e]) for e, w in chosen)
        torch.testing.assert_close(y.view(6, 16)[token], expected, rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("impl", ["loop", "grouped"])
def test_idle_experts_get_zero_gradients(impl: str) -> None:
    moe = MoE(config_of(expert_impl=impl, top_k=1, num_experts=8))
    y, routing = moe(torch.randn(1, 2, 16))
    y.sum().backward()
    idle = routing.tokens_per_expert == 0
    assert idle.sum() >= 6
    for w in moe.experts.mlp.parameters():
        per_expert = w.grad.view(8, 8, 16).abs().sum((1, 2))
        assert (per_expert[idle] == 0).all()
        assert (per_expert[~idle] > 0).all()


def test_no_tokens_at_all() -> None:
    moe = MoE(config_of())
    y, _ = moe(torch.zeros(0, 16, requires_grad=True))
    y.sum().backward()
    assert y.shape == (0, 16)
    assert not moe.experts.mlp.w1.grad.any()


def test_moe_layers_start_different_and_reproducible() -> None:
    torch.manual_seed(0)
    first, second = MoE(config_of()), MoE(config_of())
    torch.manual_seed(0)
    again = MoE(config_of())
    assert torch.equal(first.experts.mlp.w1, again.experts.mlp.w1)
    assert not torch.equal(first.experts.mlp.w1, second.experts.mlp.w1)


@pytest.mark.parametrize("autocast", [False, True])
def test_router_is_float32_whatever_comes_in(autocast: bool) -> None:
    router = Router(config_of())
    with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
        routing = router(torch.randn(5, 16, dtype=torch.bfloat16))
    assert routing.logits.dtype == routing.probs.dtype == torch.float32
    assert routing.weights.dtype == torch.bfloat16
    torch.testing.assert_close(routing.probs.sum(-1), torch.ones(5))


@pytest.mark.parametrize("p", [1.0, 2.0, None])
def test_expert_weights_are_divided_by_their_p_norm(p: float | None) -> None:
    routing = Router(config_of(normalize_expert_weights=p))(torch.randn(5, 16))
    chosen = routing.probs.gather(-1, routing.expert_ids)
    expected = chosen if p is None else chosen / chosen.norm(p=p, dim=-1, keepdim=True)
    torch.testing.assert_close(routing.weights, expected)


def test_jitter_is_for_training_only() -> None:
    router, x = Router(config_of(router_jitter=0.3)), torch.randn(5, 16)
    assert not torch.equal(router(x).logits, router(x).logits)
    router.eval()
    assert torch.equal(router(x).logits, router(x).logits)


@pytest.mark.parametrize(("convention", "expected"), [("megablocks", 1.0), ("huggingface", 2.0)])
def test_balance_loss_at_perfect_balance(convention: str, expected: float) -> None:
    ids = torch.tensor([[0, 1], [2, 3], [1, 2], [3, 0]])
    layer = routing_of(torch.full((4, 4), 0.25), ids)
    assert load_balancing.balance_loss([layer, layer, layer], convention) == expected


def test_balance_loss_of_collapsed_layers() -> None:
    """One expert takes all: E for megablocks; opposite collapses cancel in Hugging Face's convention."""
    one, other = torch.eye(2)[[0, 0, 0]], torch.eye(2)[[1, 1, 1]]
    layers = [routing_of(p, p.argmax(-1, keepdim=True)) for p in (one, other)]
    assert load_balancing.balance_loss(layers, "megablocks") == 2.0
    assert load_balancing.balance_loss(layers, "huggingface") == 1.0


def test_balance_loss_is_megablocks_formula() -> None:
    layers = [routing_of(p, p.topk(2).indices) for p in torch.randn(3, 7, 4).softmax(-1)]
    counts = torch.stack([F.one_hot(r.expert_ids, 4).sum((0, 1)) for r in layers]).float()
    scores = torch.stack([r.probs.mean(0) for r in layers])
    expected = 4 / (3 * 7 * 2) * (counts * scores).sum()
    torch.testing.assert_close(load_balancing.balance_loss(layers, "megablocks"), expected)


@pytest.mark.parametrize("convention", ["megablocks", "huggingface"])
def test_padding_counts_nowhere(convention: str) -> None:
    probs = torch.randn(2, 9, 4).softmax(-1)
    mask = torch.tensor([True] * 6 + [False] * 3)
    padded = [routing_of(p, p.topk(2).indices, mask) for p in probs]
    bare = [routing_of(p[:6], p[:6].topk(2).indices) for p in probs]
    for fn in (lambda r, m: load_balancing.balance_loss(r, convention, m), load_balancing.router_z_loss):
        torch.testing.assert_close(fn(padded, mask), fn(bare, None))
    for got, expected in zip(
        load_balancing.routing_stats(padded, mask), load_balancing.routing_stats(bare), strict=True
    ):
        torch.testing.assert_close(got, expected)
    nothing = torch.zeros(9, dtype=torch.bool)
    empty = [routing_of(p, p.topk(2).indices, nothing) for p in probs]
    assert load_balancing.balance_loss(empty, convention, nothing) == 0
    assert load_balancing.router_z_loss(empty, nothing) == 0


def test_router_z_loss() -> None:
    logits = torch.randn(5, 4)
    layer = Routing(logits, logits.softmax(-1), *[torch.empty(0)] * 3)
    torch.testing.assert_close(
        load_balancing.router_z_loss([layer]), (logits.exp().sum(-1).log() ** 2).mean()
    )


def test_statistics_of_the_routers() -> None:
    logits = [torch.tensor([[1.0, 1.0, 1.0, 1.0], [5.0, 0.0, 0.0, 0.0]]), torch.zeros(2, 4)]
    counts = torch.ones(4, dtype=torch.int64)
    ids = torch.zeros(2, 1, dtype=torch.int64)
    found = load_balancing.routing_stats(
        [Routing(x, x.softmax(-1), ids.float(), ids, counts) for x in logits]
    )
    sure = torch.distributions.Categorical(logits=logits[0][1]).entropy() / math.log(4)
    torch.testing.assert_close(found.token_entropy, torch.stack(((1 + sure) / 2, torch.tensor(1.0))))
    z = (logits[0].logsumexp(-1).square().mean(), torch.tensor(math.log(4) ** 2))
    torch.testing.assert_close(found.z, torch.stack(z))
    assert found.max_logit.tolist() == [5, 0]
    assert not any(term.requires_grad for term in found)


def test_load_entropy() -> None:
    loads = torch.tensor([[5, 5, 5, 5], [20, 0, 0, 0], [10, 10, 0, 0], [0, 0, 0, 0]])
    torch.testing.assert_close(load_balancing.load_entropy(loads), torch.tensor([1.0, 0.0, 0.5, 0.0]))


def test_loss_free_bias_moves_the_choice_and_not_the_weights() -> None:
    router, x = Router(config_of(loss_free_bias_rate=0.5)), torch.randn(50, 16)
    before = router(x)
    router.update_bias(torch.tensor([100, 0, 0, 0]))
    assert router.expert_bias.tolist() == [-0.5, 0.5, 0.5, 0.5]
    router.update_bias(torch.tensor([30, 10, 20, 20]))
    assert router.expert_bias.tolist() == [-1.0, 1.0, 0.5, 0.5]
    after = router(x)
    assert after.tokens_per_expert[0] == 0
    assert torch.equal(after.probs, before.probs)
    chosen = after.probs.gather(-1, after.expert_ids)
    torch.testing.assert_close(after.weights, chosen / chosen.sum(-1, keepdim=True))


def test_loss_free_bias_balances_a_skewed_router() -> None:
    torch.manual_seed(0)
    router = Router(config_of(loss_free_bias_rate=0.02, top_k=1))
    x = torch.randn(400, 16) + 4 * router.layer.weight[0].detach()
    entropy = load_balancing.load_entropy(router(x).tokens_per_expert)
    for _ in range(200):
        router.update_bias(router(x).tokens_per_expert)
    assert entropy < 0.9 < 0.97 < load_balancing.load_entropy(router(x).tokens_per_expert)


def test_the_bias_is_in_the_state_dict_only_where_used() -> None:
    assert "router.expert_bias" in MoE(config_of(loss_free_bias_rate=0.1)).state_dict()
    assert "router.expert_bias" not in MoE(config_of()).state_dict()


def test_routing_survives_activation_checkpointing() -> None:
    moe, x = MoE(config_of()), torch.randn(6, 16, requires_grad=True)

    def gradients(checkpointed: bool) -> list[Tensor]:
        y, routing = (
            torch.utils.checkpoint.checkpoint(moe, x, use_reentrant=False) if checkpointed else moe(x)
        )
        loss = y.square().sum() + load_balancing.balance_loss([routing], "megablocks")
        return list(torch.autograd.grad(loss, [x, *moe.parameters()]))

    for got, expected in zip(gradients(True), gradients(False), strict=True):
        assert torch.equal(got, expected)


def test_a_layer_alone_needs_no_model() -> None:
    torch.manual_seed(0)
    alone = MoE(d_model=16, num_experts=4, top_k=2)
    assert alone.experts.mlp.w1.shape == (4 * 28, 16)
    config = DbrxConfig(
        d_model=16, n_heads=2, n_kv_heads=1, n_layers=3, ffn_hidden_size=28, num_experts=4, top_k=2
    )
    torch.manual_seed(0)
    within = MoE(config)
    assert torch.equal(alone.experts.mlp.w1, within.experts.mlp.w1)
    assert torch.allclose(alone.experts.mlp.w2, within.experts.mlp.w2 * 6**0.5)
    torch.manual_seed(0)
    assert torch.equal(
        MoE(d_model=16, num_experts=4, top_k=2, n_layers=3).experts.mlp.w2, within.experts.mlp.w2
    )
    y, routing = alone(torch.randn(5, 16))
    assert y.shape == (5, 16)
    assert float(load_balancing.balance_loss([routing], "megablocks")) > 0.5
    with pytest.raises(ValueError, match=r"^num_expert: no such option; did you mean num_experts\?"):
        MoE(d_model=16, num_expert=2)
    with pytest.raises(ValueError, match=r"^d_model: is missing"):
        MoE(num_experts=2)
    with pytest.raises(ValueError, match=r"^MoE: takes a config, or options"):
        MoE()
