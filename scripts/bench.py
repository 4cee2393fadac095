"""Training speed and memory beside what else a user would pick, on the same work.

    python scripts/bench.py [--tasks step layer loss] [--shapes NAME ...] [--dtypes float32 bfloat16]
                            [--routing real balanced] [--rounds 5] [--threads N] [--json FILE]

Every contestant is a process of its own, built from the same weights and fed the same inputs. They take
turns, one step each, in an order that alternates; two warm-up steps are thrown away. Each must compute what
the first one does, or the table says so and the exit code is 1. Those that are not installed are named.
`ours` is what `dbrx-train train` runs; `ours, as modules` lacks the allocator's settings that the command
makes on a CPU.

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
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from bench_contestants import AS_RUN, NEEDS_GPU
from bench_tasks import CPU_SHAPES, GPU_SHAPES, TASKS, Shape, flops, make_inputs, roof_task
from turns import in_turn

from dbrx_train.train.allocator import keep_freed_memory

WARM_UP = 2
TOLERANCE = {"float32": 1e-4, "bfloat16": 3e-2}


# --- one contestant's process -------------------------------------------------------------------------------


def contend(task: str, name: str, shape: Shape, dtype: str, routing: str, folder: str, device: str) -> None:
    """Say whether it is there; then a line for every line read: seconds and what was computed."""
    try:
        if name in NEEDS_GPU and device == "cpu":
            raise ModuleNotFoundError("a GPU")
        if name == "roof":
            step = roof_task(dtype, device)
        else:
            step = TASKS[task][0](name, shape, dtype, routing, Path(folder), device)
    except (ImportError, RuntimeError, ValueError) as error:
        print(json.dumps({"absent": f"{type(error).__name__}: {error}".splitlines()[0]}), flush=True)
        return
    before = _reset_peak(device)
    if name == AS_RUN and device == "cpu":
        keep_freed_memory()
    print(json.dumps({}), flush=True)
    for _ in sys.stdin:
        start = time.perf_counter()
        tensors = step()
        if device == "cuda":
            torch.cuda.synchronize()
        seconds = time.perf_counter() - start
        peak = _peak(device) - before
        values = [float(torch.linalg.vector_norm(t.detach(), dtype=torch.float32)) for t in tensors]
        del tensors  # whose memory is not the next step's
        print(json.dumps({"seconds": seconds, "values": values, "peak": peak}), flush=True)


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


def contest(case: list[str], entered: list[str], args: argparse.Namespace) -> list[dict[str, Any]]:
    """On a CPU a step at a time, in turn; on a GPU, whose memory is short, all steps at a time."""
    task, shape, dtype, *_ = case
    contestants = [Contestant(name) for name in (*entered, "roof")]
    heats = [contestants]
    if DEVICE == "cuda":
        heats = [[each] for _ in range(args.heats) for each in contestants]
    for heat in heats:
        processes = [Process(each, case, args.threads) for each in heat]
        for process in in_turn(processes, WARM_UP + args.rounds):
            process.step()
        for process in processes:
            process.end()
    return list(_rows(contestants, task, SHAPES[shape], dtype))


def _rows(contestants: list[Contestant], task: str, shape: Shape, dtype: str) -> Iterator[dict[str, Any]]:
    *entrants, roof = contestants
    best, copied = (max(values) for values in zip(*(r["values"] for r in roof.results), strict=True))
    mine = next((c for c in entrants if c.name == AS_RUN), None)
    first = next((c for c in entrants if c.absent is None), None)
    for entrant in entrants:
        if entrant.absent is not None:
            yield {"contestant": entrant.name, "absent": entrant.absent}
            continue
        assert first is not None  # it is this one, or an earlier one
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
    known = {name for _, names in TASKS.values() for name in names}
    parser.add_argument(
        "--contestants", nargs="+", choices=sorted(known), metavar="NAME", help="default: all"
    )
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--trained", type=int, default=40, help="steps of training before")
    parser.add_argument("--heats", type=int, default=2, help="processes of each, on a GPU, one after another")
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
            make_inputs(SHAPES[shape], Path(folder), DEVICE, args.trained, "step" in args.tasks)
            for task, dtype, routing in itertools.product(args.tasks, args.dtypes, args.routing):
                if task == "loss" and routing != args.routing[0]:
                    continue
                entered = [name for name in TASKS[task][1] if name in (args.contestants or known)]
                if not entered:
                    continue
                rows = contest([task, shape, dtype, routing, folder], entered, args)
                case = {"task": task, "shape": shape, "dtype": dtype, "routing": routing}
                print(f"\n{task}, {shape}, {dtype}, {routing} routing")
                there = next((row for row in rows if "roof" in row), None)
                if there is not None:
                    roof = f"{there['roof'] / 1e9:,.0f} GFLOP/s, copy {there['copy'] / 1e9:,.1f} GB/s"
                    print(f"{machine}, torch {torch.__version__}: roof {roof}\n")
                show(rows)
                everything += [case | row for row in rows]
    if args.json:
        args.json.write_text(json.dumps(everything, indent=1))
    return 0 if all(row.get("agrees", True) for row in everything) else 1


if __name__ == "__main__":
    sys.exit(main())
