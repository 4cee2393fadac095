"""The same numbers on every device: what the CPU computes in float32 is the reference."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
import torch
from torch._subclasses.fake_tensor import DataDependentOutputException, FakeTensorMode

from dbrx_train.model.config import DbrxConfig
from dbrx_train.model.decoder import Dbrx, DbrxOutput
from dbrx_train.model.generation import generate
from dbrx_train.model.moe.experts import EXPERT_FNS
from dbrx_train.model.moe.grouped_glu import check_available
from dbrx_train.parallel import clip_grad_norm

CUDA = pytest.param(
    "cuda",
    marks=[pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA GPU")],
)
SHAPE = DbrxConfig(
    d_model=64, n_layers=2, n_heads=4, n_kv_heads=2, ffn_hidden_size=112, vocab_size=512, max_seq_len=128
)


def step(device: str, expert_impl: str, autocast: bool = False) -> tuple[DbrxOutput, dict[str, torch.Tensor]]:
    """Loss and gradients of one batch of packed documents, brought to the CPU."""
    config = DbrxConfig.from_dict(SHAPE.to_dict() | {"expert_impl": expert_impl})
    model = Dbrx(config, seed=1).to(device)
    ids = torch.randint(512, (2, 97), generator=torch.Generator().manual_seed(0)).to(device)
    documents = (torch.arange(97, device=device) > 40).long().expand(2, -1)
    with torch.autocast(device, dtype=torch.bfloat16, enabled=autocast):
        output = model(ids, labels=ids, document_ids=documents)
    assert output.loss is not None
    output.loss.backward()
    return output, {name: p.grad.cpu() for name, p in model.named_parameters() if p.grad is not None}


@pytest.mark.parametrize("device", ["cpu", CUDA])
@pytest.mark.parametrize("expert_impl", ["loop", "grouped"])
def test_loss_and_every_gradient_equal_the_reference(device: str, expert_impl: str) -> None:
    expected, expected_grads = step("cpu", "loop")
    output, grads = step(device, expert_impl)
    assert expected.loss is not None
    assert output.loss is not None
    torch.testing.assert_close(output.loss.cpu(), expected.loss, rtol=1e-5, atol=1e-5)
    assert grads.keys() == expected_grads.keys()
    for name, grad in grads.items():
        worst = (grad - expected_grads[name]).abs().max() / expected_grads[name].abs().max()
        assert worst < (1e-5 if device == "cpu" else 1e-4), name


@pytest.mark.parametrize("device", ["cpu", CUDA])
def test_bfloat16_stays_near_float32(device: str) -> None:
    expected, _ = step("cpu", "loop")
    output, _ = step(device, "auto", autocast=True)
    assert expected.loss is not None
    assert output.loss is not None
    torch.testing.assert_close(output.loss.cpu(), expected.loss, rtol=2e-2, atol=0)


@pytest.fixture
def deterministic(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    monkeypatch.setenv("CUBLAS_WORKSPACE_CONFIG", ":4096:8")
    torch.use_deterministic_algorithms(True)
    yield
    torch.use_deterministic_algorithms(False)


@pytest.mark.usefixtures("deterministic")
@pytest.mark.parametrize("device", ["cpu", CUDA])
@pytest.mark.parametrize("autocast", [False, True])
@pytest.mark.parametrize("expert_impl", ["loop", "auto"])
def test_deterministic_mode_gives_the_same_bits_twice(device: str, autocast: bool, expert_impl: str) -> None:
    (one, grads), (other, others) = (step(device, expert_impl, autocast) for _ in range(2))
    assert one.loss is not None
    assert other.loss is not None
    assert torch.equal(one.loss, other.loss)
    assert grads.keys() == others.keys()
    assert [name for name, grad in grads.items() if not torch.equal(grad, others[name])] == []


@pytest.mark.parametrize("autocast", [False, True])
def test_the_host_waits_for_no_number_of_a_step(autocast: bool) -> None:
    """Tensors without content have none to wait for: whoever asks is told so. (Experts are one operator.)"""
    config = DbrxConfig.from_dict(
        SHAPE.to_dict()
        | {"router_z_loss_weight": 0.1, "output_z_loss_weight": 0.1, "loss_free_bias_rate": 0.1}
    )
    model = Dbrx(config)
    with FakeTensorMode():
        for module in model.modules():
            for name, parameter in module.named_parameters(recurse=False):
                setattr(module, name, torch.nn.Parameter(torch.empty(parameter.shape)))
            for name, buffer in module.named_buffers(recurse=False):
                setattr(module, name, torch.empty(buffer.shape))
        optimizer = torch.optim.AdamW(model.parameters(), fused=True)
        ids = torch.randint(512, (2, 97))
        with torch.autocast("cpu", dtype=torch.bfloat16, enabled=autocast):
            output = model(ids, labels=ids, document_ids=ids)
        output.loss.backward()
        clip_grad_norm(model.parameters(), 1.0)
        optimizer.step()
        model.update_expert_bias(output.routing.tokens_per_expert)
        with pytest.raises(DataDependentOutputException):
            output.loss.item()


def experts(
    device: str, impl: str, counts: list[int], dtype: torch.dtype, weighted: bool
) -> list[torch.Tensor]:
    """Outputs and every gradient, brought to the CPU."""
    generator, tokens = torch.Generator().manual_seed(0), sum(counts)
    shapes = [(tokens, 64), (tokens,), *[(len(counts), 112, 64)] * 3]
    x, weight, *matrices = (
        torch.randn(s, generator=generator).to(device, dtype).requires_grad_() for s in shapes
    )
    sizes = torch.tensor(counts, device=device)
    y = EXPERT_FNS[impl](x, weight if weighted else None, *matrices, sizes)
    inputs = [x, *matrices, *([weight] if weighted else [])]
    grads = torch.autograd.grad(y, inputs, torch.randn(y.shape, generator=generator).to(device, dtype))
    return [t.detach().cpu() for t in (y, *grads)]


@pytest.mark.parametrize("device", ["cpu", CUDA])
@pytest.mark.parametrize("impl", ["auto", "grouped", "grouped_mm", "grouped_gemm"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_experts_with_no_one_and_all_tokens(device: str, impl: str, dtype: torch.dtype) -> None:
    try:
        check_available(impl)
    except ValueError as error:
        pytest.skip(str(error))
    if impl == "grouped_gemm" and (device == "cpu" or dtype == torch.float32):
        pytest.skip("grouped_gemm computes in bfloat16 on CUDA alone")
    for counts in ([3, 0, 40, 1], [0, 0, 44, 0], [11, 11, 11, 11]):
        for weighted in (True, False):
            expected = experts("cpu", "loop", counts, dtype, weighted)
            got, again = (experts(device, impl, counts, dtype, weighted) for _ in range(2))
            for a, b, c in zip(got, expected, again, strict=True):
                limit = {torch.float32: 1e-5 if device == "cpu" else 1e-4, torch.bfloat16: 2e-2}[dtype]
                assert (a - b).abs().max() <= limit * b.abs().max()
                assert torch.equal(a, c), "twice the same"


@pytest.mark.parametrize("device", ["cpu", CUDA])
def test_cached_generation_is_the_uncached(device: str) -> None:
    model = Dbrx(SHAPE, seed=1).to(device).eval()
    prompt = torch.arange(5, device=device)[None]
    tokens = torch.stack(list(generate(model, prompt, 12, stop_ids=())), dim=1)
    whole = torch.cat((prompt, tokens), dim=1)
    with torch.no_grad():
        logits = model(whole[:, :-1]).logits
    assert torch.equal(logits[:, 4:].argmax(-1), tokens)
