"""torch.compile changes how attention and norms are computed, not what."""

from __future__ import annotations

import shutil

import pytest
import torch

from dbrx_train.model.compiling import compile_dense
from dbrx_train.model.config import DbrxConfig
from dbrx_train.model.decoder import Dbrx
from dbrx_train.parallel import checkpoint_activations

CONFIG = DbrxConfig(
    d_model=32, n_layers=2, n_heads=4, n_kv_heads=2, ffn_hidden_size=56, vocab_size=101, max_seq_len=64
)


@pytest.mark.slow
@pytest.mark.skipif(shutil.which("g++") is None, reason="torch.compile needs a C++ compiler on a CPU")
def test_every_gradient_stays() -> None:
    ids = torch.randint(101, (2, 48), generator=torch.Generator().manual_seed(0))
    documents = (torch.arange(48) > 20).long().expand(2, -1)
    found = {}
    for compiled in (False, True):
        model = Dbrx(CONFIG, seed=1)
        checkpoint_activations(model, "norm_attn_norm")
        if compiled:
            compile_dense(model)
        loss = model(ids, labels=ids, document_ids=documents).loss
        assert loss is not None
        loss.backward()
        found[compiled] = {name: p.grad for name, p in model.named_parameters()}
    assert found[True].keys() == found[False].keys()
    for name, grad in found[True].items():
        assert (grad - found[False][name]).abs().max() <= 1e-5 * found[False][name].abs().max(), name
