"""What reading data costs a step: steps with the loader beside steps on the same batch again and again.

    python scripts/bench_stall.py CONFIG.yaml [key=value ...] [--steps 100] [--rounds 3] [--workers 0 2]

Runs `dbrx-train train`, each time in a process of its own and from the run's beginning, in turn, without
evaluations and checkpoints. Timed are the steps after the first ten. `stall` is by how much longer a step
takes than with a batch that is there already; `waited` is the share of the time in which training stood still
for a batch, as the run itself logs it.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from typing import Any

from turns import in_turn, spread

WARM_UP = 10


def train(arguments: list[str], synthetic: bool, steps: int) -> None:
    """In a process of its own: train, print what was measured, and end."""
    from composer import Logger, State

    from dbrx_train import cli
    from dbrx_train.data.stream.loader import TimedLoader
    from dbrx_train.train.callbacks import order

    class Clock(order.PeakMemory):
        def batch_start(self, state: State, logger: Logger) -> None:
            step, waited = state.timestamp.batch.value, state.train_dataloader.waited
            now = time.perf_counter()
            if step == WARM_UP:
                self.begin, self.waited = now, waited
            elif step == WARM_UP + steps:
                seconds = now - self.begin
                found = {"rate": steps / seconds, "waited": (waited - self.waited) / seconds}
                print("\n" + json.dumps(found), flush=True)
                os._exit(0)

    read = TimedLoader.__iter__

    def again_and_again(loader: TimedLoader) -> Iterator[Any]:
        batch = next(read(loader))
        while True:
            loader.arrived()
            yield batch

    order.PeakMemory = Clock  # type: ignore[misc]
    if synthetic:
        TimedLoader.__iter__ = again_and_again  # type: ignore[method-assign]
    sys.argv = ["dbrx-train", "train", *arguments]
    cli.main()


def main() -> None:
    raw = argparse.RawDescriptionHelpFormatter
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=raw)
    parser.add_argument("config")
    parser.add_argument("overrides", nargs="*")
    parser.add_argument("--steps", type=int, default=100)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--workers", type=int, nargs="+", default=[0, 2])
    parser.add_argument("--contend", choices=["loader", "synthetic"], help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.contend:
        train([args.config, *args.overrides], args.contend == "synthetic", args.steps)
        return
    contestants = [("synthetic", 0), *(("loader", workers) for workers in args.workers)]
    found: dict[tuple[str, int], list[dict[str, float]]] = {each: [] for each in contestants}
    for each in in_turn(contestants, args.rounds):
        found[each].append(measure(args, *each))
    for (name, workers), runs in found.items():
        rates = [run["rate"] for run in runs]
        pairs = zip(runs, found["synthetic", 0], strict=True)
        stalls = [100 * (theirs["rate"] / mine["rate"] - 1) for mine, theirs in pairs]
        print(
            f"{name}, {workers} workers: {spread(rates, '.3f', ' steps/s')}, "
            f"stall {spread(stalls, '.1f', ' %')}, "
            f"waited {100 * statistics.median(run['waited'] for run in runs):.2f} %"
        )


def measure(args: argparse.Namespace, name: str, workers: int) -> dict[str, float]:
    with tempfile.TemporaryDirectory() as folder:
        command = [
            *(sys.executable, __file__, args.config, *args.overrides, f"data.num_workers={workers}"),
            *("evaluation.max_samples=0", "checkpoints.interval=1dur", f"folder={folder}/run"),
            *(
                f"max_duration={WARM_UP + args.steps + 8}ba",
                f"logging.mlflow_uri=sqlite:///{folder}/mlflow.db",
            ),
            *("--contend", name, "--steps", str(args.steps)),
        ]
        done = subprocess.run(command, capture_output=True, text=True)
    lines = [line for line in done.stdout.splitlines() if line.startswith('{"rate"')]
    if not lines:
        sys.exit(done.stdout[-1000:] + done.stderr[-1000:])
    result: dict[str, float] = json.loads(lines[-1])
    return result


if __name__ == "__main__":
    main()
