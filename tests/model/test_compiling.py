"""torch.compile changes how attention and norms are computed, not what."""

from __future__ import annotations

import shutil
from dataclasses import replace
from typing import Any

import pytest
import torch
import torch.distributed as dist

from dbrx_train.model.compiling import compile_dense, compiled_graphs
from dbrx_train.model.config import DbrxConfig
from dbrx_train.model.decoder import Dbrx
from dbrx_train.parallel import MeshShape, checkpoint_activations, parallelize

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
        if compiled:
            compile_dense(model)
        checkpoint_activations(model, "norm_attn_norm")
        loss = model(ids, labels=ids, document_ids=documents).loss
        assert loss is not None
        loss.backward()
        found[compiled] = {name: p.grad for name, p in model.named_parameters()}
    assert found[True].keys() == found[False].keys()
    for name, grad in found[True].items():
        assert (grad - found[False][name]).abs().max() <= 1e-5 * found[False][name].abs().max(), name


@pytest.mark.slow
@pytest.mark.usefixtures("no_process_group")
@pytest.mark.parametrize("recomputed", ["norm_attn_norm", "full"])
def test_there_is_a_graph_where_norms_are_sharded_apart(recomputed: str) -> None:
    """In bfloat16 the norms are units of their own, whose gathering no graph holds."""
    torch._dynamo.reset()
    counters: Any = torch._dynamo.utils.counters
    counters.clear()
    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    try:
        with torch.device("meta"):
            model = Dbrx(replace(CONFIG, n_layers=1))
        compile_dense(model, "aot_eager")
        checkpoint_activations(model, recomputed)
        parallelize(model, MeshShape(1, 1, 1), device_type="cpu", seed=1, param_dtype=torch.bfloat16)
        ids = torch.zeros(1, 16, dtype=torch.int64)
        assert compiled_graphs() == 0
        with torch.autocast("cpu", torch.bfloat16):
            loss = model(ids, labels=ids, document_ids=ids).loss
        assert loss is not None
        loss.backward()
        assert compiled_graphs()
    finally:
        dist.destroy_process_group()
