"""The chunked cross-entropy equals the plain one, and never holds all logits."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor
from torch.nn import functional as F
from torch.utils._python_dispatch import TorchDispatchMode

from dbrx_train.model.loss import LMHead, chunked_cross_entropy

T, D, V = 23, 12, 57


def inputs(dtype: torch.dtype = torch.float32) -> tuple[Tensor, Tensor, Tensor]:
    generator = torch.Generator().manual_seed(0)
    hidden = torch.randn(T, D, generator=generator).to(dtype).requires_grad_()
    weight = torch.randn(V, D, generator=generator).to(dtype).requires_grad_()
    labels = torch.randint(V, (T,), generator=generator)
    labels[[0, 5, 6, 22]] = -100
    return hidden, weight, labels


@pytest.mark.parametrize("z_weight", [0.0, 0.3])
@pytest.mark.parametrize("chunk_size", [1, 5, 23, 100])
def test_equals_the_plain_loss_and_its_gradients(chunk_size: int, z_weight: float) -> None:
    hidden, weight, labels = inputs()
    logits = hidden @ weight.T
    cross_entropy = F.cross_entropy(logits, labels)
    z = logits.logsumexp(-1)[labels != -100].square().mean()
    expected = torch.autograd.grad(3 * (cross_entropy + z_weight * z), (hidden, weight))

    loss = chunked_cross_entropy(hidden, weight, labels, chunk_size, z_weight)
    got = torch.autograd.grad(3 * loss.total, (hidden, weight))

    torch.testing.assert_close(loss.cross_entropy, cross_entropy)
    torch.testing.assert_close(loss.z, z)
    torch.testing.assert_close(loss.total, cross_entropy + z_weight * z)
    torch.testing.assert_close(loss.token_losses, F.cross_entropy(logits, labels, reduction="none"))
    assert loss.num_labels == 19
    for a, b in zip(got, expected, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-5, atol=1e-6)


def test_no_label_is_a_zero_loss() -> None:
    hidden, weight, labels = inputs()
    loss = chunked_cross_entropy(hidden, weight, labels.fill_(-100), 4, 0.1)
    assert loss.total == loss.cross_entropy == loss.z == loss.num_labels == 0
    for grad in torch.autograd.grad(loss.total, (hidden, weight)):
        assert torch.equal(grad, torch.zeros_like(grad))


@pytest.mark.parametrize("frozen", ["hidden", "weight"])
def test_what_is_frozen_gets_no_gradient(frozen: str) -> None:
    hidden, weight, labels = inputs()
    plain = torch.autograd.grad(F.cross_entropy(hidden @ weight.T, labels), (hidden, weight))
    (hidden if frozen == "hidden" else weight).requires_grad_(False)
    chunked_cross_entropy(hidden, weight, labels, 7).total.backward()
    assert (hidden.grad is None) == (frozen == "hidden")
    assert (weight.grad is None) == (frozen == "weight")
    got, expected = (weight.grad, plain[1]) if frozen == "hidden" else (hidden.grad, plain[0])
    torch.testing.assert_close(got, expected)


@pytest.mark.parametrize("autocast", [False, True])
def test_bfloat16(autocast: bool) -> None:
    hidden, weight, labels = inputs(torch.float32 if autocast else torch.bfloat16)
    exact_hidden, exact_weight = hidden.detach().double(), weight.detach().double()
    exact_hidden.requires_grad_()
    exact_weight.requires_grad_()
    exact = F.cross_entropy(exact_hidden @ exact_weight.T, labels)
    exact.backward()
    with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
        loss = chunked_cross_entropy(hidden, weight, labels, 5)
    loss.total.backward()
    assert loss.total.dtype == torch.float32
    assert loss.total.item() == pytest.approx(exact.item(), rel=2e-2)
    for ours, theirs in ((hidden, exact_hidden), (weight, exact_weight)):
        assert ours.grad.dtype == ours.dtype
        error = (ours.grad.double() - theirs.grad).norm() / theirs.grad.norm()
        assert error < 2e-2


@pytest.mark.parametrize("autocast", [False, True])
@pytest.mark.parametrize("num_labels", [1500, 4000])
def test_bfloat16_weighs_every_number_of_labels_alike(num_labels: int, autocast: bool) -> None:
    """Rounding adds noise to a gradient, but must not make it longer or shorter: microbatches add up."""
    generator = torch.Generator().manual_seed(0)
    hidden = torch.randn(num_labels + 100, 64, generator=generator).bfloat16()
    weight = torch.randn(V, 64, generator=generator).mul(0.1).bfloat16()
    labels = torch.randint(V, (num_labels + 100,), generator=generator)
    labels[:: num_labels // 100][:100] = -100

    def gradients(dtype: torch.dtype, autocast: bool) -> tuple[Tensor, ...]:
        leaves = [t.to(dtype).requires_grad_() for t in (hidden, weight)]
        with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
            loss = chunked_cross_entropy(*leaves, labels, 256)
        assert loss.num_labels == num_labels
        return torch.autograd.grad(0.7 * loss.total, leaves)

    exact = gradients(torch.float32, autocast=False)
    rounded = gradients(torch.float32 if autocast else torch.bfloat16, autocast)
    for a, b in zip(rounded, exact, strict=True):
        assert ((a * b).sum() / b.square().sum()).item() == pytest.approx(1, abs=2e-4)


class LargestTensor(TorchDispatchMode):
    """Records the most elements of any tensor that an operation returns."""

    def __init__(self) -> None:
        super().__init__()
        self.numel = 0
        self.operations = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):  # type: ignore[no-untyped-def]
        out = func(*args, **(kwargs or {}))
        for tensor in out if isinstance(out, (tuple, list)) else (out,):
            if isinstance(tensor, Tensor):
                self.numel = max(self.numel, tensor.numel())
        self.operations += 1
        return out


def test_logits_never_exist_whole() -> None:
    tokens, vocab, chunk = 64, 1000, 8
    head = LMHead(4, vocab, chunk_size=chunk)
    hidden = torch.randn(tokens, 4, requires_grad=True)
    labels = torch.randint(vocab, (tokens,))
    with LargestTensor() as seen:
        head(hidden, labels).total.backward()
    assert seen.numel == chunk * vocab
    with LargestTensor() as plain:
        F.cross_entropy(head(hidden), labels).backward()
    assert plain.numel == tokens * vocab  # the instrument does see such tensors


def test_evaluation_does_no_gradient_work() -> None:
    hidden, weight, labels = inputs()
    with LargestTensor() as training:
        trained = chunked_cross_entropy(hidden, weight, labels, 5)
    with torch.no_grad(), LargestTensor() as evaluation:
        evaluated = chunked_cross_entropy(hidden, weight, labels, 5)
    assert evaluation.operations < training.operations
    assert torch.equal(evaluated.total, trained.total)
    assert not evaluated.total.requires_grad


def test_head_gives_logits_or_loss() -> None:
    head = LMHead(D, V, chunk_size=4, z_weight=0.5)
    hidden, _, labels = inputs()
    assert head(hidden.view(1, T, D)).shape == (1, T, V)
    loss = head(hidden.view(1, T, D), labels.view(1, T))
    torch.testing.assert_close(loss.cross_entropy, F.cross_entropy(head(hidden), labels))
    torch.testing.assert_close(loss.total, loss.cross_entropy + 0.5 * loss.z)
