"""The work that `bench.py` gives to contestants: shapes, shared inputs, and what one step is."""

from __future__ import annotations

import itertools
import os
import time
from collections.abc import Callable, Iterable, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from bench_contestants import LAYER, LOSS, STEP, matrices
from torch import Tensor, nn

from dbrx_train import Dbrx, DbrxConfig
from dbrx_train.model.loss import LMHead

LOSS_WORDS = 100_352


@dataclass(frozen=True)
class Shape:
    config: DbrxConfig
    batch: int
    seq_len: int


def _shape(batch: int, seq_len: int, **sizes: Any) -> Shape:
    common = {"max_seq_len": seq_len, "balance_loss": "none"}
    return Shape(DbrxConfig(**(common | sizes)), batch, seq_len)


CPU_SHAPES = {
    "quickstart": _shape(2, 512, d_model=96, n_layers=4, n_heads=4, n_kv_heads=2, ffn_hidden_size=168),
    "fine-grained": _shape(
        2,
        1024,
        d_model=512,
        n_layers=4,
        n_heads=8,
        n_kv_heads=2,
        ffn_hidden_size=128,
        num_experts=64,
        top_k=8,
        vocab_size=8192,
    ),
    "dbrx/8": _shape(
        1, 4096, d_model=768, n_layers=2, n_heads=6, n_kv_heads=1, ffn_hidden_size=1344, vocab_size=12544
    ),
}
GPU_SHAPES = {
    "dbrx-layer": _shape(4, 4096, n_layers=1, vocab_size=12544),
    "dbrx-9b, 6 layers": _shape(
        2,
        4096,
        d_model=2048,
        n_layers=6,
        n_heads=16,
        ffn_hidden_size=3584,
    ),
}


# --- the shared inputs --------------------------------------------------------------------------------------


def make_inputs(shape: Shape, folder: Path, device: str, trained: int, whole: bool) -> None:
    """Real text, what a router chooses for it after some steps of training, and if ``whole`` all weights."""
    torch.manual_seed(0)
    config = replace(shape.config, balance_loss="megablocks")
    if device == "cuda":  # the router of a narrower model chooses; a whole one would take too long
        config = replace(config, d_model=512, n_layers=2, n_heads=8, n_kv_heads=2, ffn_hidden_size=256)
    ids = _text(config.vocab_size, (trained + 6) * shape.batch, shape.seq_len).to(device)
    model = Dbrx(config).to(device)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3, fused=True)
    for batch in ids[: trained * shape.batch].split(shape.batch):
        loss = model(batch, labels=batch).loss
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
    chosen: list[Tensor] = []
    router = model.transformer.blocks[-1].ffn.router
    router.register_forward_hook(lambda _module, _inputs, routing: chosen.append(routing.expert_ids))
    with torch.no_grad():
        model(ids[-shape.batch :])
    made = {"ids": ids[trained * shape.batch :].clone(), "chosen": chosen[0]}
    torch.save(made, folder / "made.pt")
    if not whole:
        return
    if device == "cuda":
        with torch.device(device):
            model = Dbrx(shape.config)
    torch.save(model.state_dict(), folder / "model.pt")


def _text(vocab_size: int, samples: int, seq_len: int) -> Tensor:
    """Python's library in the GPT-4 vocabulary, its rarer words made one."""
    from dbrx_train.data.tokenizer import load_tokenizer

    tokenizer, ids = load_tokenizer(), list[int]()
    files = sorted(Path(os.__file__).parent.glob("*.py"))
    for file in itertools.cycle(files):
        ids += tokenizer.encode(file.read_text(encoding="utf-8", errors="replace"))
        if len(ids) >= samples * seq_len:
            break
    text = torch.tensor(ids[: samples * seq_len])
    common = text.bincount(minlength=vocab_size).argsort(descending=True, stable=True)[: vocab_size - 1]
    rank = torch.full((int(text.max()) + 1,), vocab_size - 1)
    rank[common[common < len(rank)]] = torch.arange(len(common))[common < len(rank)]
    return rank[text].view(samples, seq_len)


def force_routing(ids_Tk: Tensor | None) -> None:
    """Have every router of this process choose ``ids_Tk``, or all experts equally often."""

    def choose(scores: Tensor, k: int, *_: Any, **__: Any) -> Any:
        ids = ids_Tk
        if ids is None:
            tokens, num_experts = scores.shape
            ids = torch.arange(tokens * k, device=scores.device).view(-1, k) % num_experts
        return torch.return_types.topk((scores.gather(-1, ids), ids))  # type: ignore[attr-defined]

    torch.topk = torch.Tensor.topk = choose  # type: ignore[assignment]


# --- tasks: each makes a function that does one step --------------------------------------------------------

Step = Callable[[], Sequence[Tensor]]
"""Returns what all contestants must agree in: scalars, and tensors, of which the norms are compared."""


def step_task(name: str, shape: Shape, dtype: str, routing: str, folder: Path, device: str) -> Step:
    ids = _made(folder, device)["ids"]
    with torch.device(device):
        model = STEP[name](shape.config)
    model.load_state_dict(torch.load(folder / "model.pt", map_location=device, mmap=True))
    if routing == "balanced":
        force_routing(None)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-4, fused=True)
    batches = itertools.cycle(ids.split(shape.batch))
    cast: AbstractContextManager[Any] = nullcontext()
    if dtype == "bfloat16":
        cast = torch.autocast(device, torch.bfloat16)

    def step() -> Sequence[Tensor]:
        batch = next(batches)
        with cast:
            output = model(batch, labels=batch)
        output.loss.backward()
        nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()
        return [output.loss]

    return step


def layer_task(name: str, shape: Shape, dtype: str, routing: str, folder: Path, device: str) -> Step:
    chosen, config = _made(folder, device)["chosen"], shape.config
    kind = getattr(torch, dtype)
    generator = torch.Generator(device).manual_seed(0)
    with torch.device(device):
        layer = LAYER[name](config).to(kind)
    for data in matrices(layer, lambda p: p.data):
        flat = data.numel() // config.d_model, config.d_model
        drawn = torch.empty(flat, dtype=kind, device=device).normal_(0, flat[1] ** -0.5, generator=generator)
        data.copy_(drawn.view(data.shape))
    force_routing(chosen if routing == "real" else None)
    x = torch.randn(1, chosen.shape[0], config.d_model, device=device, generator=generator).to(kind)
    x.requires_grad_()
    direction = torch.randn(x.shape, device=device, generator=generator).to(kind)

    def step() -> Sequence[Tensor]:
        x.grad = None
        layer.zero_grad()
        output = layer(x)
        output = output[0] if isinstance(output, tuple) else output
        output.backward(direction)
        assert x.grad is not None
        return [output.detach(), x.grad, *matrices(layer, lambda p: p.grad)]

    return step


def loss_task(name: str, shape: Shape, dtype: str, _routing: str, _folder: Path, device: str) -> Step:
    kind, width = getattr(torch, dtype), shape.config.d_model
    generator = torch.Generator(device).manual_seed(0)
    head = LMHead(width, LOSS_WORDS, shape.config.loss_chunk_size).to(device, kind)
    head.weight.data.normal_(0, 0.02, generator=generator)
    hidden = torch.randn(shape.seq_len, width, device=device, generator=generator).to(kind).requires_grad_()
    labels = torch.randint(LOSS_WORDS, (shape.seq_len,), device=device, generator=generator)
    measure = LOSS[name](head)

    def step() -> Sequence[Tensor]:
        hidden.grad = head.weight.grad = None
        loss = measure(hidden, labels)
        loss.backward()
        assert hidden.grad is not None
        assert head.weight.grad is not None
        return [loss, hidden.grad, head.weight.grad]

    return step


def _made(folder: Path, device: str) -> dict[str, Tensor]:
    made: dict[str, Tensor] = torch.load(folder / "made.pt", map_location=device)
    return made


TASKS: dict[str, tuple[Callable[..., Step], Iterable[str]]] = {
    "step": (step_task, STEP),
    "layer": (layer_task, LAYER),
    "loss": (loss_task, LOSS),
}


def flops(task: str, shape: Shape) -> float:
    config, tokens = shape.config, shape.batch * shape.seq_len
    if task == "step":
        return tokens * config.flops_per_token(shape.seq_len, causal=True)
    if task == "loss":
        return 6.0 * shape.seq_len * config.d_model * LOSS_WORDS
    weights = 3 * config.top_k * config.ffn_hidden_size + config.num_experts
    return 6.0 * tokens * config.d_model * weights


def roof_task(dtype: str, device: str) -> Step:
    n = 8192 if device == "cuda" else 2048
    a = torch.randn(n, n, device=device).to(getattr(torch, dtype))
    out = torch.empty_like(a)
    block = torch.empty(2**28 if device == "cuda" else 2**26, device=device)  # floats: no cache holds them
    copy = torch.empty_like(block)

    def seconds(work: Callable[[], Any]) -> float:
        start = time.perf_counter()
        work()
        if device == "cuda":
            torch.cuda.synchronize()
        return time.perf_counter() - start

    def best() -> Sequence[Tensor]:
        copied = min(seconds(lambda: copy.copy_(block)) for _ in range(3))
        product = min(seconds(lambda: torch.mm(a, a, out=out)) for _ in range(10))
        return torch.tensor([2 * n**3 / product, 8 * block.numel() / copied]).unbind()

    return best
