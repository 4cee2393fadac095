"""Steps of all kinds of models on fake CUDA tensors; prints what came of each as a line of JSON."""

from __future__ import annotations

import json
import sys
import traceback
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import torch
from fake_cuda import fake_cuda, layer_step, model_step, on_cuda
from torch import Tensor

from dbrx_train.model.config import ACTIVATION_CHECKPOINTING, DbrxConfig
from dbrx_train.model.decoder import Dbrx, Layout
from dbrx_train.model.generation import KVCache, sample
from dbrx_train.model.lora import apply_lora, cast_frozen
from dbrx_train.model.moe import experts
from dbrx_train.parallel import checkpoint_activations, clip_grad_norm

SHAPE = DbrxConfig(
    d_model=64, n_layers=2, n_heads=4, n_kv_heads=2, ffn_hidden_size=112, vocab_size=512, max_seq_len=16_384
)
DENSE = replace(SHAPE, num_experts=1, top_k=1)
BF16 = torch.bfloat16
CASES: dict[str, Callable[[], Any]] = {}


def case(run: Callable[[], Any]) -> Callable[[], Any]:
    CASES[run.__name__] = run
    return run


def tokens(length: int = 256, samples: int = 2) -> tuple[Tensor, dict[str, Tensor]]:
    """Ids and what tells their documents apart, as a batch of the loader has it."""
    ids = torch.randint(512, (samples, length), device="cuda")
    starts = torch.zeros(samples, 3, dtype=torch.int32, device="cuda")
    return ids, {"document_ids": torch.zeros_like(ids), "document_starts": starts}


def train(
    config: DbrxConfig, dtype: torch.dtype | None = BF16, length: int = 256, **more: Any
) -> dict[str, Any]:
    """A whole step; what was launched."""
    model = on_cuda(lambda: Dbrx(config))
    checkpoint_activations(model, more.pop("recompute", "none"))
    optimizer = torch.optim.AdamW(model.parameters(), foreach=True)
    ids, documents = tokens(length)
    launches = model_step(model, ids, dtype, **documents, **more)
    grads = {name: p.grad for name, p in model.named_parameters()}
    wrong = [n for n, g in grads.items() if g is None or not g.is_cuda or g.dtype != torch.float32]
    assert not wrong, wrong
    clip_grad_norm(model.parameters(), 1.0)
    optimizer.step()
    return {"launches": dict(launches.count), "bytes": launches.bytes, "largest_mask": launches.square}


@case
def packed_documents_bf16() -> Any:
    return train(SHAPE)


@case
def packed_documents_float32() -> Any:
    return train(SHAPE, None)


@case
def long_samples() -> Any:
    return train(SHAPE, length=16_384)


@case
def dense() -> Any:
    return train(DENSE)


@case
def dense_float32() -> Any:
    return train(DENSE, None)


@case
def losses_of_all_kinds() -> Any:
    weights = {"router_z_loss_weight": 0.1, "output_z_loss_weight": 0.1, "loss_free_bias_rate": 0.1}
    return train(replace(SHAPE, reset_positions=True, norm="rmsnorm", router_jitter=0.1, **weights))


@case
def log_probabilities() -> Any:
    return train(SHAPE, return_log_probs=True)


for what in ACTIVATION_CHECKPOINTING[1:]:
    CASES[f"recomputed_{what}"] = lambda what=what: train(SHAPE, recompute=what)
for impl in ("grouped", "grouped_mm", "grouped_gemm"):
    CASES[f"experts_{impl}"] = lambda impl=impl: train(replace(SHAPE, expert_impl=impl))


@case
def without_documents() -> Any:
    model = on_cuda(lambda: Dbrx(SHAPE))
    launches = model_step(model, tokens()[0], BF16)
    return {"launches": dict(launches.count)}


def adapted(config: DbrxConfig) -> Any:
    def make() -> Dbrx:
        model = Dbrx(config)
        apply_lora(model, 8, 16.0)
        return model

    model = on_cuda(make)
    cast_frozen(model, BF16)
    ids, documents = tokens()
    model_step(model, ids, BF16, **documents)
    trained = [p for p in model.parameters() if p.requires_grad]
    assert trained
    assert all(p.grad is not None and p.grad.is_cuda for p in trained)


@case
def adapters_dense() -> Any:
    adapted(DENSE)


if hasattr(torch.nn.functional, "grouped_mm"):  # without it the host asks for the counts

    @case
    def adapters() -> Any:
        adapted(SHAPE)


@case
def generation() -> Any:
    model = on_cuda(lambda: Dbrx(SHAPE)).eval().to(BF16)
    with torch.no_grad():
        cache = KVCache(SHAPE.n_layers, 40)
        logits = model(tokens(32)[0], cache=cache).logits[:, -1]
        for temperature in (0.0, 0.7):
            rows = len(logits)
            token = sample(logits, [temperature] * rows, [0.9] * rows, [0.5] * rows)
            assert token.is_cuda
            logits = model(token[:, None], cache=cache).logits[:, -1]
        model(tokens(4)[0], cache=cache)  # several more after a prefix


@case
def in_context_rows() -> Any:
    model = on_cuda(lambda: Dbrx(SHAPE)).eval()
    ids, _ = tokens(64)
    visible = torch.ones(2, 64, 64, dtype=torch.bool, device="cuda").tril()
    layout = Layout(torch.arange(64, device="cuda").expand(2, -1), visible)
    with torch.no_grad(), torch.autocast("cuda", BF16):
        logits = model(ids, layout=layout, logits_at=torch.tensor([3, 70], device="cuda")).logits
    assert logits.is_cuda


@case
def layer_of_dbrx() -> Any:
    """The 132B model's MoE layer and a microbatch of 4,096 tokens, of which performance.md tells."""
    launches = layer_step(DbrxConfig(), 4096)
    return {"launches": dict(launches.count), "bytes": launches.bytes}


@case
def block_of_dbrx() -> Any:
    config = DbrxConfig(n_layers=1, vocab_size=512)
    block = on_cuda(lambda: Dbrx(config)).transformer
    ids, documents = tokens(4096, 1)
    from fake_cuda import Launches

    with Launches() as launches:
        with torch.autocast("cuda", BF16):
            hidden, _ = block(ids, documents["document_ids"], starts=documents["document_starts"])
        hidden.sum().backward()
    return {"launches": dict(launches.count), "bytes": launches.bytes}


def main(names: list[str]) -> None:
    experts.check_available = lambda impl: None  # each is an operator; its kernels are not run
    for name in names or CASES:
        with fake_cuda():
            try:
                found = {"found": CASES[name]()}
            except Exception as error:
                found = {"error": "".join(traceback.format_exception(error)[-12:])}
        print(json.dumps({"case": name, **found}), flush=True)


if __name__ == "__main__":
    main(sys.argv[1:])
