"""Documents by their places: attention of variable lengths computes what the mask does."""

from __future__ import annotations

import itertools

import pytest
import torch
from torch import Tensor
from torch.nn import functional as F

from dbrx_train.model import decoder, documents
from dbrx_train.model.config import DbrxConfig
from dbrx_train.model.decoder import Dbrx
from dbrx_train.model.documents import DocumentOffsets, document_offsets, document_starts

IDS = torch.tensor([[0] * 7 + [1] * 16 + [-1], [-1] * 2 + [5] * 20 + [-1] * 2, [3] * 24])


def by_offsets(q: Tensor, k: Tensor, v: Tensor, found: DocumentOffsets) -> Tensor:
    """What flash attention's kernel is to do, by its contract: q [T, H, C], k and v [T, K, C]."""
    assert found.offsets.dtype == torch.int32
    assert int(found.offsets.diff().max()) <= found.longest
    bounds = found.offsets.tolist()
    assert bounds[0] == 0
    assert bounds[-1] == len(q)
    parts = []
    for begin, end in itertools.pairwise(bounds):
        rows = (t[begin:end].transpose(0, 1)[None] for t in (q, k, v))
        parts.append(
            F.scaled_dot_product_attention(*rows, is_causal=True, enable_gqa=True)[0].transpose(0, 1)
        )
    return torch.cat(parts)


@pytest.mark.parametrize("told", [False, True])
def test_places_give_every_gradient_that_a_mask_gives(told: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    config = DbrxConfig(
        d_model=32, n_layers=2, n_heads=4, n_kv_heads=2, ffn_hidden_size=56, vocab_size=101, max_seq_len=32
    )
    ids = torch.randint(101, IDS.shape, generator=torch.Generator().manual_seed(0))
    found = []
    for at_once in (False, True):
        if at_once:  # the kernel needs a GPU; all else is what runs there
            monkeypatch.setattr(decoder, "takes_offsets", lambda *_: True)
            monkeypatch.setattr(documents, "_variable_length", by_offsets)
        model = Dbrx(config, seed=1)
        starts = document_starts(IDS) if told else None
        loss = model(ids, labels=ids, document_ids=IDS, document_starts=starts).loss
        assert loss is not None
        loss.backward()
        found.append([loss.detach(), *(p.grad for p in model.parameters())])
    for masked, placed in zip(*found, strict=True):
        torch.testing.assert_close(placed, masked, rtol=1e-5, atol=1e-6)


def test_places_of_documents() -> None:
    starts = document_starts(IDS)
    assert starts.tolist() == [[0, 7, 23], [0, 2, 22], [0, 24, 24]]
    offsets, longest = document_offsets(starts, 24)
    assert offsets.tolist() == [0, 7, 23, 24, 26, 46, 48, 72, 72, 72]
    assert longest == 24


def test_a_document_in_pieces_is_refused() -> None:
    with pytest.raises(ValueError, match="document_ids: has a document in pieces"):
        document_starts(torch.tensor([[0, 1, 0]]))


@pytest.mark.parametrize(
    ("device", "dtype", "head_dim", "takes"),
    [
        ("cuda", torch.bfloat16, 128, True),
        ("cuda", torch.float16, 64, True),
        ("cuda", torch.float32, 128, False),
        ("cuda", torch.bfloat16, 260, False),
        ("cuda", torch.bfloat16, 100, False),
        ("cpu", torch.bfloat16, 128, False),
    ],
)
def test_where_there_is_a_kernel(device: str, dtype: torch.dtype, head_dim: int, takes: bool) -> None:
    assert documents.takes_offsets(torch.device(device), dtype, head_dim) is takes


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA GPU")
def test_the_kernel_keeps_its_contract() -> None:
    """Flash attention's on a GPU, beside the reference in float32."""
    generator = torch.Generator("cuda").manual_seed(0)
    starts = document_starts(IDS).cuda()
    shapes = [(3, 4, 24, 64), (3, 2, 24, 64), (3, 2, 24, 64)]
    exact = [torch.randn(shape, device="cuda", generator=generator) for shape in shapes]
    rounded = [t.bfloat16().requires_grad_() for t in exact]
    wanted = [t.detach().float().requires_grad_() for t in rounded]
    found = documents.attend_by_offset(*rounded, document_offsets(starts, 24))
    q, k, v = (t.transpose(1, 2).flatten(0, 1) for t in wanted)
    expected = by_offsets(q, k, v, document_offsets(starts, 24)).unflatten(0, (3, 24)).transpose(1, 2)
    direction = torch.randn(expected.shape, device="cuda", generator=generator)
    found.backward(direction.bfloat16())
    expected.backward(direction)
    torch.testing.assert_close(found.float(), expected, rtol=2e-2, atol=2e-2)
    for got, true in zip(rounded, wanted, strict=True):
        torch.testing.assert_close(got.grad.float(), true.grad, rtol=4e-2, atol=4e-2)
