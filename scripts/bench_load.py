"""A load test of generation, as figure 2 of DBRX's launch: users come whether earlier ones are done or not.

    python scripts/bench_load.py [HF_DIR] [--rates 0.25 0.5 1] [--users 12] [--prompt 2000] [--new 256]
                                 [--slots 16] [--chunk 256] [--dtype float32] [--threads 2]

Each rate (arrivals a second, at random times: a Poisson process) is a line: tokens/s of the median user once
its first token is there, and of all together; seconds to the first token and between two (median, 99th
percentile); how many had no token yet when the last one came: many, where a rate is more than can be served.
Without HF_DIR a small model with random weights is asked.
"""

from __future__ import annotations

import argparse
import random
import time
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
import torch

from dbrx_train import Dbrx, DbrxConfig
from dbrx_train.model.continuous_batching import ContinuousBatch, Request

SMALL = {"d_model": 256, "n_layers": 4, "n_heads": 8, "n_kv_heads": 2, "ffn_hidden_size": 448}


@dataclass
class User:
    """One who asks."""

    arrives: float
    tokens: list[float] = field(default_factory=list)
    """When each token was there."""


def serve(model: Dbrx, users: list[User], args: argparse.Namespace) -> tuple[float, int]:
    """Fill in the users' times; when all was done, and how many had no token yet when the last one came."""
    rng = random.Random(0)
    batch = ContinuousBatch(model, args.slots, args.prompt + args.new, args.chunk)
    begin, waiting, unserved = time.perf_counter(), list(enumerate(users)), -1
    while waiting or not batch.is_idle:
        now = time.perf_counter() - begin
        while waiting and waiting[0][1].arrives <= now:
            number, _ = waiting.pop(0)
            prompt = [rng.randrange(model.config.vocab_size) for _ in range(args.prompt)]
            batch.add(number, Request(prompt, args.new))
        if not waiting and unserved < 0:
            unserved = sum(not user.tokens for user in users)
        if batch.is_idle:
            time.sleep(max(0.0, waiting[0][1].arrives - now))
            continue
        for token in batch.step():
            users[token.key].tokens.append(time.perf_counter() - begin)
    return time.perf_counter() - begin, unserved


def line(rate: float, users: list[User], end: float, unserved: int) -> str:
    first = np.array([user.tokens[0] - user.arrives for user in users])
    gaps = np.concatenate([np.diff(user.tokens) for user in users])
    speeds = [(len(user.tokens) - 1) / (user.tokens[-1] - user.tokens[0]) for user in users]
    whole = sum(len(user.tokens) for user in users) / end
    cells = [f"{rate:g}", f"{np.median(speeds):.1f}", f"{whole:.1f}"]
    cells += [f"{np.median(first):.2f}, {np.percentile(first, 99):.2f}"]
    cells += [f"{np.median(gaps):.3f}, {np.percentile(gaps, 99):.3f}", str(unserved)]
    return f"| {' | '.join(cells)} |"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("folder", nargs="?", type=Path)
    parser.add_argument("--rates", nargs="+", type=float, default=[0.25, 0.5, 1.0])
    parser.add_argument("--users", type=int, default=12)
    parser.add_argument("--prompt", type=int, default=2000)
    parser.add_argument("--new", type=int, default=256)
    parser.add_argument("--slots", type=int, default=16)
    parser.add_argument("--chunk", type=int, default=256)
    parser.add_argument("--dtype", choices=["float32", "bfloat16"], default="float32")
    parser.add_argument("--threads", type=int, default=2)
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    if args.folder:
        model = Dbrx.from_pretrained(args.folder)
    else:
        room = args.prompt + args.new
        model = Dbrx(
            DbrxConfig(**SMALL, num_experts=16, top_k=4, vocab_size=12_544, max_seq_len=room), seed=0
        )
    model = model.eval().to(getattr(torch, args.dtype))
    print("| users/s | tokens/s, of a user | of all | first token, s: median, p99 | next, s | waiting |")
    print("|---|---|---|---|---|---|", flush=True)
    for rate in args.rates:
        rng = random.Random(1)
        arrivals = np.cumsum([rng.expovariate(rate) for _ in range(args.users)])
        users = [User(float(at)) for at in arrivals]
        print(line(rate, users, *serve(model, users, args)), flush=True)


if __name__ == "__main__":
    main()
