"""Training speed and memory beside what else a user would pick, on the same work.

    python scripts/bench.py [--tasks step layer loss] [--shapes NAME ...] [--dtypes float32 bfloat16]
                            [--routing real balanced] [--rounds 5] [--threads N] [--json FILE]

Every contestant is a process of its own, built from the same weights and fed the same inputs. They take
turns, one step each, in an order that alternates; two warm-up steps are thrown away. Each must compute what
the first one does, or the table says so and the exit code is 1. Those that are not installed are named.

- step: forward, backward, clipping to 1.0 and fused AdamW of a whole model. bfloat16 is autocast over float32
  weights, for all alike.
- layer: forward and backward of one MoE layer. bfloat16 is the dtype of weights and input.
- loss: forward and backward of the head and the cross-entropy over 100,352 words.

Routing is `real` (what a router chose for real text, the source code of Python's library, after 40 steps of
training with a balance loss of 0.05) or `balanced` (forced: every expert gets the same number of tokens).

FLOP/s count `DbrxConfig.flops_per_token(seq_len, causal=True)` in a step, 6 per active weight and token in a
layer and in the loss; recomputation does not count. The roof is the best of ten 2048 x 2048 matrix products
(8192 on a GPU) in the same dtype, in a process that takes its turn too; `share` is the ratio of the two. Peak
memory is what a step adds to what the process holds before its first (on a CPU resident, on a GPU allocated).
The copy of 256 MiB (1 GiB on a GPU) says what memory-bound parts can reach.
"""

from __future__ import annotations

import argparse
import itertools
import json
import os
import platform
import re
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterable, Iterator
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, field, replace
from functools import partial
from pathlib import Path
from typing import Any

import torch
from foundry import foundry_module
from torch import Tensor, nn

from dbrx_train import Dbrx, DbrxConfig, MoE
from dbrx_train.model.loss import LMHead

WARM_UP = 2
TOLERANCE = {"float32": 1e-4, "bfloat16": 3e-2}


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
    "dbrx-9b/6": _shape(
        2,
        4096,
        d_model=2048,
        n_layers=4,
        n_heads=16,
        ffn_hidden_size=3584,
    ),
}


# --- contestants --------------------------------------------------------------------------------------------


def ours(expert_impl: str, config: DbrxConfig) -> nn.Module:
    return Dbrx(replace(config, expert_impl=expert_impl))


def transformers_model(attention: str, config: DbrxConfig) -> nn.Module:
    from transformers import DbrxConfig as HfConfig
    from transformers import DbrxForCausalLM

    hf = HfConfig(**config.to_hf(), attn_implementation=attention, use_cache=False)
    hf.ffn_config.moe_jitter_eps = None
    model: nn.Module = DbrxForCausalLM(hf)
    return model


def foundry_model(config: DbrxConfig) -> nn.Module:
    """LLM Foundry's experts in transformers' decoder: Foundry's own would bring its dependencies along."""
    model = transformers_model("sdpa", config)
    for block in model.transformer.blocks:  # type: ignore[union-attr]
        block.ffn = foundry_layer(config, returns_tuple=True)  # type: ignore[union-attr]
    return model


def foundry_layer(config: DbrxConfig, returns_tuple: bool = False) -> nn.Module:
    module = foundry_module("models", "layers", "dmoe.py")
    layer: nn.Module = module.dMoE(
        device=torch.device("cpu"),
        hidden_size=config.d_model,
        ffn_hidden_size=config.ffn_hidden_size,
        moe_num_experts=config.num_experts,
        moe_top_k=config.top_k,
        mlp_type="glu",
        activation_fn=nn.functional.silu,
        moe_normalize_expert_weights=config.normalize_expert_weights,
        bias=False,
    )
    if returns_tuple:
        layer.register_forward_hook(lambda _module, _inputs, output: (output, None))
    return layer


def transformers_layer(config: DbrxConfig) -> nn.Module:
    layer: nn.Module = (
        transformers_model("eager", replace(config, n_layers=1, vocab_size=64))
        .transformer.blocks[  # type: ignore[index, union-attr]
            0
        ]
        .ffn
    )
    return layer


def our_layer(expert_impl: str, config: DbrxConfig) -> nn.Module:
    return MoE(replace(config, expert_impl=expert_impl))


def megablocks_layer(mlp_impl: str, config: DbrxConfig) -> nn.Module:
    from megablocks.layers.arguments import Arguments
    from megablocks.layers.dmoe import dMoE

    arguments = Arguments(
        hidden_size=config.d_model,
        ffn_hidden_size=config.ffn_hidden_size,
        bias=False,
        return_bias=False,
        activation_fn=nn.functional.silu,
        moe_num_experts=config.num_experts,
        moe_top_k=config.top_k,
        moe_normalize_expert_weights=config.normalize_expert_weights,
        moe_loss_weight=0,
        mlp_type="glu",
        mlp_impl=mlp_impl,
        fp16=False,
        bf16=True,
    )
    layer: nn.Module = dMoE(arguments)
    return layer


STEP: dict[str, Callable[[DbrxConfig], nn.Module]] = {
    "loop": partial(ours, "loop"),
    "ours": partial(ours, "auto"),
    "transformers eager": partial(transformers_model, "eager"),
    "transformers sdpa": partial(transformers_model, "sdpa"),
    "foundry torch_dmoe": foundry_model,
}
LAYER: dict[str, Callable[[DbrxConfig], nn.Module]] = {
    "loop": partial(our_layer, "loop"),
    "ours": partial(our_layer, "auto"),
    "ours grouped_gemm": partial(our_layer, "grouped_gemm"),
    "transformers": transformers_layer,
    "foundry torch_dmoe": foundry_layer,
    "megablocks grouped": partial(megablocks_layer, "grouped"),
    "megablocks sparse": partial(megablocks_layer, "sparse"),
}
NEEDS_GPU = {"ours grouped_gemm", "megablocks grouped", "megablocks sparse"}


def force_routing(ids_Tk: Tensor | None) -> None:
    """Have every router of this process choose ``ids_Tk``, or all experts equally often."""

    def choose(scores: Tensor, k: int, *_: Any, **__: Any) -> Any:
        ids = ids_Tk
        if ids is None:
            tokens, num_experts = scores.shape
            ids = torch.arange(tokens * k, device=scores.device).view(-1, k) % num_experts
        return torch.return_types.topk((scores.gather(-1, ids), ids))  # type: ignore[attr-defined]

    torch.topk = torch.Tensor.topk = choose  # type: ignore[assignment]


# --- tasks: each returns a function that does one step and returns numbers to compare -----------------------

Step = Callable[[], list[float]]


def step_task(name: str, shape: Shape, dtype: str, routing: str, made: dict[str, Tensor]) -> Step:
    device = made["ids"].device.type
    with torch.device(device):
        model = STEP[name](shape.config)
    model.load_state_dict({key[2:]: value for key, value in made.items() if key.startswith("m.")})
    if routing == "balanced":
        force_routing(None)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-4, fused=True)
    batches = itertools.cycle(made["ids"].split(shape.batch))
    cast: AbstractContextManager[Any] = nullcontext()
    if dtype == "bfloat16":
        cast = torch.autocast(device, torch.bfloat16)

    def step() -> list[float]:
        batch = next(batches)
        with cast:
            output = model(batch, labels=batch)
        output.loss.backward()
        nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()
        return [float(output.loss)]

    return step


def layer_task(name: str, shape: Shape, dtype: str, routing: str, made: dict[str, Tensor]) -> Step:
    device, config = made["ids"].device.type, shape.config
    kind = getattr(torch, dtype)
    generator = torch.Generator(device).manual_seed(0)
    with torch.device(device):
        layer = LAYER[name](config).to(kind)
    parameters = [
        p for _, p in sorted(layer.named_parameters())
    ]  # names are the same for all, not their order
    for p in parameters:
        p.data.normal_(0, config.d_model**-0.5, generator=generator)
    force_routing(made["chosen"] if routing == "real" else None)
    x = torch.randn(1, made["chosen"].shape[0], config.d_model, device=device, generator=generator).to(kind)
    x.requires_grad_()
    direction = torch.randn(x.shape, device=device, generator=generator).to(kind)

    def step() -> list[float]:
        output = layer(x)
        output = output[0] if isinstance(output, tuple) else output
        output.backward(direction)
        grads = [x.grad, *(p.grad for p in parameters)]
        norms = [float(g.float().norm()) for g in grads if g is not None]
        x.grad = None
        layer.zero_grad()
        return norms

    return step


def loss_task(name: str, shape: Shape, dtype: str, _routing: str, made: dict[str, Tensor]) -> Step:
    device, kind = made["ids"].device.type, getattr(torch, dtype)
    words, width = 100_352, shape.config.d_model
    generator = torch.Generator(device).manual_seed(0)
    head = LMHead(width, words, shape.config.loss_chunk_size).to(device, kind)
    head.weight.data.normal_(0, 0.02, generator=generator)
    hidden = torch.randn(shape.seq_len, width, device=device, generator=generator).to(kind).requires_grad_()
    labels = torch.randint(words, (shape.seq_len,), device=device, generator=generator)
    measure = LOSS[name](head)

    def step() -> list[float]:
        loss = measure(hidden, labels)
        loss.backward()
        grads = hidden.grad, head.weight.grad
        hidden.grad = head.weight.grad = None
        return [float(loss), *(float(g.float().norm()) for g in grads if g is not None)]

    return step


def _transformers_loss(head: LMHead) -> Callable[[Tensor, Tensor], Tensor]:
    from transformers.loss.loss_utils import ForCausalLMLoss

    def loss(hidden: Tensor, labels: Tensor) -> Tensor:
        found: Tensor = ForCausalLMLoss(head(hidden), None, head.out_features, shift_labels=labels)
        return found

    return loss


def _liger_loss(head: LMHead) -> Callable[[Tensor, Tensor], Tensor]:
    from liger_kernel.transformers import LigerFusedLinearCrossEntropyLoss

    liger = LigerFusedLinearCrossEntropyLoss()
    return lambda hidden, labels: liger(head.weight, hidden, labels)


LOSS: dict[str, Callable[[LMHead], Callable[[Tensor, Tensor], Tensor]]] = {
    "transformers": _transformers_loss,
    "ours": lambda head: lambda hidden, labels: head(hidden, labels).total,
    "liger": _liger_loss,
}
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
        return 6.0 * shape.seq_len * config.d_model * 100_352
    weights = 3 * config.top_k * config.ffn_hidden_size + config.num_experts
    return 6.0 * tokens * config.d_model * weights


# --- one contestant's process -------------------------------------------------------------------------------


def contend(task: str, name: str, shape: Shape, dtype: str, routing: str, folder: str, device: str) -> None:
    """Say whether it is there; then a line for every line read: seconds and what was computed."""
    made = torch.load(Path(folder, "made.pt"), map_location=device, weights_only=True)
    try:
        if name in NEEDS_GPU and device == "cpu":
            raise ModuleNotFoundError("a GPU")
        step = (
            roof_task(dtype, device) if name == "roof" else TASKS[task][0](name, shape, dtype, routing, made)
        )
    except (ImportError, RuntimeError, ValueError, KeyError) as error:
        print(json.dumps({"absent": f"{type(error).__name__}: {error}".splitlines()[0]}), flush=True)
        return
    del made
    before = _reset_peak(device)
    print(json.dumps({}), flush=True)
    for _ in sys.stdin:
        start = time.perf_counter()
        values = step()
        if device == "cuda":
            torch.cuda.synchronize()
        seconds = time.perf_counter() - start
        peak = _peak(device) - before
        print(json.dumps({"seconds": seconds, "values": values, "peak": peak}), flush=True)


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

    def best() -> list[float]:
        copied = min(seconds(lambda: copy.copy_(block)) for _ in range(3))
        product = min(seconds(lambda: torch.mm(a, a, out=out)) for _ in range(10))
        return [2 * n**3 / product, 8 * block.numel() / copied]

    return best


def _reset_peak(device: str) -> float:
    if device == "cuda":
        torch.cuda.reset_peak_memory_stats()
        return float(torch.cuda.memory_allocated())
    Path("/proc/self/clear_refs").write_text("5")
    return _peak(device)


def _peak(device: str) -> float:
    if device == "cuda":
        return float(torch.cuda.max_memory_allocated())
    found = re.search(r"VmHWM:\s+(\d+) kB", Path("/proc/self/status").read_text())
    assert found is not None
    return 1024.0 * int(found[1])


# --- the shared inputs --------------------------------------------------------------------------------------


def make_inputs(shape: Shape, folder: Path, device: str, trained: int) -> None:
    """Weights after steps on real text, the text, and what the last layer's router chooses for a batch."""
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
    if device == "cuda":
        with torch.device(device):
            model = Dbrx(shape.config)
    made = {f"m.{key}": value for key, value in model.state_dict().items()}
    torch.save(made | {"ids": ids[trained * shape.batch :].clone(), "chosen": chosen[0]}, folder / "made.pt")


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


# --- the contest --------------------------------------------------------------------------------------------


@dataclass
class Contestant:
    """One of them, with what its processes measured; those of its warm-up steps are left out of ``times``."""

    name: str
    results: list[dict[str, Any]] = field(default_factory=list)
    times: list[float] = field(default_factory=list)
    absent: str | None = None


class Process:
    """A contestant's process, which does one step when told to."""

    def __init__(self, contestant: Contestant, case: list[str], threads: int) -> None:
        self.contestant, self.steps = contestant, 0
        env = os.environ | {"OMP_NUM_THREADS": str(threads)}
        command = [sys.executable, __file__, "--contend", json.dumps([contestant.name, *case])]
        pipe = subprocess.PIPE
        self.process = subprocess.Popen(command, stdin=pipe, stdout=pipe, text=True, env=env)
        self._read()

    def _read(self) -> dict[str, Any]:
        assert self.process.stdout is not None
        line = self.process.stdout.readline() or json.dumps({"absent": f"ended with {self.process.wait()}"})
        found: dict[str, Any] = json.loads(line)
        self.contestant.absent = found.get("absent")
        return found

    def step(self) -> None:
        if self.contestant.absent is not None:
            return
        assert self.process.stdin is not None
        self.process.stdin.write("\n")
        self.process.stdin.flush()
        found = self._read()
        if self.contestant.absent is None:
            self.contestant.results.append(found)
            self.steps += 1
            if self.steps > WARM_UP:
                self.contestant.times.append(found["seconds"])

    def end(self) -> None:
        if self.process.stdin is not None and self.process.poll() is None:
            self.process.stdin.close()
        self.process.wait(30)


def contest(case: list[str], args: argparse.Namespace) -> list[dict[str, Any]]:
    """On a CPU a step at a time, in turn; on a GPU, whose memory is short, all steps at a time, twice."""
    task, shape, dtype, *_ = case
    contestants = [Contestant(name) for name in (*(args.contestants or TASKS[task][1]), "roof")]
    heats = [[each] for _ in range(2) for each in contestants] if DEVICE == "cuda" else [contestants]
    for heat in heats:
        processes = [Process(each, case, args.threads) for each in heat]
        for number in range(WARM_UP + args.rounds):
            for process in processes if number % 2 else reversed(processes):
                process.step()
        for process in processes:
            process.end()
    return list(_rows(contestants, task, SHAPES[shape], dtype))


def _rows(contestants: list[Contestant], task: str, shape: Shape, dtype: str) -> Iterator[dict[str, Any]]:
    *entrants, roof = contestants
    best, copied = (max(values) for values in zip(*(r["values"] for r in roof.results), strict=True))
    mine = next((c for c in entrants if c.name == "ours"), None)
    first = next(c for c in entrants if c.absent is None)
    for entrant in entrants:
        if entrant.absent is not None:
            yield {"contestant": entrant.name, "absent": entrant.absent}
            continue
        times = entrant.times
        pairs = zip(entrant.results, first.results, strict=True)
        off = max(abs(x / y - 1) for a, b in pairs for x, y in zip(a["values"], b["values"], strict=True))
        row = {
            "contestant": entrant.name,
            "seconds": statistics.median(times),
            "least": min(times),
            "greatest": max(times),
            "flops": flops(task, shape) / statistics.median(times),
            "peak": max(result["peak"] for result in entrant.results),
            "off": off,
            "agrees": off < TOLERANCE[dtype],
        }
        row["share"] = row["flops"] / best
        row["roof"], row["copy"] = best, copied
        if mine is not None and mine.absent is None:
            ratios = [theirs / ours for theirs, ours in zip(times, mine.times, strict=True)]
            row["ratio"] = [statistics.median(ratios), min(ratios), max(ratios)]
        yield row


def show(rows: list[dict[str, Any]]) -> None:
    print(
        "| contestant | seconds (least-greatest) | time/ours | GFLOP/s | share of roof | peak MiB | off by |"
    )
    print("|---|---|---|---|---|---|---|")
    for row in rows:
        if "absent" in row:
            print(f"| {row['contestant']} | absent: {row['absent']} | | | | | |")
            continue
        ratio = "{:.2f} ({:.2f}-{:.2f})".format(*row["ratio"]) if "ratio" in row else ""
        seconds = "{seconds:.4f} ({least:.4f}-{greatest:.4f})".format_map(row)
        off = f"{row['off']:.0e}{'' if row['agrees'] else ' DISAGREES'}"
        print(
            f"| {row['contestant']} | {seconds} | {ratio} | {row['flops'] / 1e9:,.0f} | {row['share']:.2f} "
            f"| {row['peak'] / 2**20:,.0f} | {off} |"
        )


DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
SHAPES = GPU_SHAPES if DEVICE == "cuda" else CPU_SHAPES


def _processor() -> str:
    found = re.search(r"model name\s*: (.*)", Path("/proc/cpuinfo").read_text())
    return found[1] if found else platform.machine()


def main() -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--tasks", nargs="+", default=list(TASKS), choices=list(TASKS))
    parser.add_argument("--shapes", nargs="+", default=list(SHAPES), choices=list(SHAPES))
    parser.add_argument("--dtypes", nargs="+", default=list(TOLERANCE), choices=list(TOLERANCE))
    parser.add_argument("--routing", nargs="+", default=["real", "balanced"], choices=["real", "balanced"])
    parser.add_argument("--contestants", nargs="+", help="default: all that the task knows")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--trained", type=int, default=40, help="steps of training before")
    parser.add_argument("--threads", type=int, default=os.cpu_count())
    parser.add_argument("--json", type=Path)
    parser.add_argument("--contend", type=json.loads, help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.contend:
        name, task, shape, dtype, routing, folder = args.contend
        contend(task, name, SHAPES[shape], dtype, routing, folder, DEVICE)
        return 0
    machine = torch.cuda.get_device_name() if DEVICE == "cuda" else f"{_processor()} x {args.threads}"
    everything = []
    for shape in args.shapes:
        with tempfile.TemporaryDirectory() as folder:
            make_inputs(SHAPES[shape], Path(folder), DEVICE, args.trained)
            for task, dtype, routing in itertools.product(args.tasks, args.dtypes, args.routing):
                if task == "loss" and routing != args.routing[0]:
                    continue
                rows = contest([task, shape, dtype, routing, folder], args)
                case = {"task": task, "shape": shape, "dtype": dtype, "routing": routing}
                print(f"\n{task}, {shape}, {dtype}, {routing} routing")
                there = next(row for row in rows if "roof" in row)
                roof = f"{there['roof'] / 1e9:,.0f} GFLOP/s, copy {there['copy'] / 1e9:,.1f} GB/s"
                print(f"{machine}, torch {torch.__version__}: roof {roof}\n")
                show(rows)
                everything += [case | row for row in rows]
    if args.json:
        args.json.write_text(json.dumps(everything, indent=1))
    return 0 if all(row.get("agrees", True) for row in everything) else 1


if __name__ == "__main__":
    sys.exit(main())
