"""Generation beside transformers' ``generate``, from the same weights: tokens/s at several batch sizes.

    python scripts/bench_generate.py [--models tiny small] [--batches 1 8 32] [--dtypes float32 bfloat16]
                                     [--prompts equal ragged] [--rounds 3] [--threads 2] [--new 48]

Both are processes of their own, which take turns, one run each, in an order that alternates; a run to warm
up is thrown away. All is greedy, and no token ends a text, so that both write what they are asked for:

- `equal`: as many prompts as the batch has rows, 128 tokens each;
- `ragged`: three times as many, of 16 to 240 tokens, each with a number of new tokens of its own, from a
  quarter of the most to the most. transformers pads to the left and goes on until the longest of a batch is
  done; what was not asked for does not count.

Tokens/s are new tokens over the whole time, reading the prompts included. The last column says how many texts
are the same to the last token.
"""

from __future__ import annotations

import argparse
import multiprocessing
import random
import statistics
import time
from multiprocessing.connection import Connection
from typing import Any

import torch
from turns import in_turn, spread

from dbrx_train import Dbrx, DbrxConfig

MODELS = {
    "tiny": {"d_model": 96, "n_layers": 4, "n_heads": 6, "n_kv_heads": 2, "ffn_hidden_size": 168},
    "small": {"d_model": 512, "n_layers": 8, "n_heads": 8, "n_kv_heads": 2, "ffn_hidden_size": 896},
}
WORDS = {"tiny": 100_352, "small": 12_544}
Work = list[tuple[list[int], int]]
"""Prompts, and how many tokens are to follow each."""


def workload(name: str, batch: int, new: int, words: int) -> Work:
    rng = random.Random(0)

    def prompt(length: int) -> list[int]:
        return [rng.randrange(words) for _ in range(length)]

    if name == "equal":
        return [(prompt(128), new) for _ in range(batch)]
    return [(prompt(rng.randint(16, 240)), rng.randint(new // 4, new)) for _ in range(3 * batch)]


def made(name: str) -> Dbrx:
    config = DbrxConfig(**MODELS[name], num_experts=16, top_k=4, vocab_size=WORDS[name], max_seq_len=512)
    model = Dbrx(config, seed=0)
    with torch.no_grad():
        model.lm_head.weight.mul_(20)  # so that rounding decides on no token
    return model.eval()


class Ours:
    def __init__(self, name: str, dtype: torch.dtype) -> None:
        self.model = made(name).to(dtype)

    def run(self, work: Work, batch: int) -> list[list[int]]:
        from dbrx_train.model.continuous_batching import ContinuousBatch, Request, complete

        longest = max(len(prompt) + new for prompt, new in work)
        requests = (Request(prompt, new) for prompt, new in work)
        found = dict(complete(ContinuousBatch(self.model, batch, longest), enumerate(requests)))
        return [found[i] for i in range(len(work))]


class Transformers:
    def __init__(self, name: str, dtype: torch.dtype) -> None:
        from transformers import DbrxConfig as HfConfig
        from transformers import DbrxForCausalLM

        ours = made(name)
        hf = HfConfig(**ours.config.to_hf(), attn_implementation="sdpa")
        hf.output_router_logits, hf.use_cache = False, True
        model = DbrxForCausalLM(hf)
        model.load_state_dict(ours.state_dict())
        self.model: Any = model.eval().to(dtype)

    @torch.no_grad()
    def run(self, work: Work, batch: int) -> list[list[int]]:
        found = []
        for begin in range(0, len(work), batch):
            part = work[begin : begin + batch]
            width = max(len(prompt) for prompt, _ in part)
            pad = [width - len(prompt) for prompt, _ in part]
            written = self.model.generate(
                torch.tensor([[0] * p + prompt for p, (prompt, _) in zip(pad, part, strict=True)]),
                attention_mask=torch.tensor([[0] * p + [1] * (width - p) for p in pad]),
                max_new_tokens=max(new for _, new in part),
                do_sample=False,
                eos_token_id=None,
                pad_token_id=0,
            )[:, width:].tolist()
            found += [row[:new] for row, (_, new) in zip(written, part, strict=True)]
        return found


CONTESTANTS: dict[str, type[Ours] | type[Transformers]] = {"ours": Ours, "transformers": Transformers}


def contend(line: Connection, contestant: str, model: str, dtype: str, threads: int) -> None:
    torch.set_num_threads(threads)
    made = CONTESTANTS[contestant](model, getattr(torch, dtype))
    while (asked := line.recv()) is not None:
        begin = time.perf_counter()
        texts = made.run(*asked)
        line.send((time.perf_counter() - begin, texts))


def contest(model: str, dtype: str, args: argparse.Namespace) -> None:
    spawn, lines = multiprocessing.get_context("spawn"), {}
    for name in CONTESTANTS:
        lines[name], theirs = spawn.Pipe()
        spawn.Process(target=contend, args=(theirs, name, model, dtype, args.threads), daemon=True).start()
    for kind in args.prompts:
        for batch in args.batches:
            work = workload(kind, batch, args.new, WORDS[model])
            count = sum(new for _, new in work)
            seconds: dict[str, list[float]] = {name: [] for name in lines}
            texts = {}
            for name in in_turn(list(lines), 1 + args.rounds):
                lines[name].send((work, batch))
                spent, texts[name] = lines[name].recv()
                seconds[name].append(spent)
            ours, theirs = (seconds[name][1:] for name in CONTESTANTS)
            same = statistics.mean(a == b for a, b in zip(*texts.values(), strict=True))
            rates = (spread([count / s for s in each], ".0f") for each in (ours, theirs))
            ratio = spread([b / a for a, b in zip(ours, theirs, strict=True)], ".2f")
            print(
                f"| {model}, {dtype} | {kind} | {batch} | {' | '.join(rates)} | {ratio} | {same:.0%} |",
                flush=True,
            )
    for line in lines.values():
        line.send(None)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("--models", nargs="+", default=list(MODELS), choices=list(MODELS))
    parser.add_argument("--prompts", nargs="+", default=["equal", "ragged"], choices=["equal", "ragged"])
    parser.add_argument("--batches", nargs="+", type=int, default=[1, 8, 32])
    parser.add_argument("--dtypes", nargs="+", default=["float32", "bfloat16"])
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--new", type=int, default=48)
    args = parser.parse_args()
    print("| model | prompts | batch | ours, tokens/s | transformers | ours/transformers | same texts |")
    print("|---|---|---|---|---|---|---|", flush=True)
    for model in args.models:
        for dtype in args.dtypes:
            contest(model, dtype, args)


if __name__ == "__main__":
    main()
