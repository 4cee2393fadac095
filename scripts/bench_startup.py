"""Where the time goes between the command `dbrx-train train` and the end of its first step.

    python scripts/bench_startup.py CONFIG.yaml [key=value ...]

Runs the command as it is, in a process of its own, stops it after the first step, and prints the seconds of
each part, with those of the imports that take longest. The run must not have been started before.
"""

from __future__ import annotations

import re
import subprocess
import sys

# In the order in which a run calls them; a part lasts from its call to the next one's.
PARTS = {
    "join_ranks": "ranks meet",
    "check_sources": "data is checked",
    "_open_store": "MLflow is opened",
    "build_trainer": "model and Trainer are built",
    "_record": "configuration is recorded, and the model evaluated",
}

PROGRAM = """
import sys, time
begin = time.perf_counter()
from dbrx_train import cli
marks = [("command line", time.perf_counter())]
from dbrx_train.train import environment, run
from dbrx_train.train.callbacks import order
marks.append(("imports", time.perf_counter()))

def timed(place, name):
    inner = getattr(place, name)
    def wrapped(*args, **kwargs):
        marks.append((name, time.perf_counter()))
        return inner(*args, **kwargs)
    setattr(place, name, wrapped)

for name in {names}:
    timed(environment if name == "join_ranks" else run, name)

class First(order.PeakMemory):
    def fit_start(self, state, logger):
        marks.append(("fit", time.perf_counter()))
    def batch_start(self, state, logger):
        marks.append(("batch", time.perf_counter()))
    def batch_end(self, state, logger):
        marks.append(("end", time.perf_counter()))
        last = begin
        for name, at in marks:
            print("MARK", name, at - last)
            last = at
        sys.stdout.flush()
        import os
        os._exit(0)

order.PeakMemory = First
sys.argv = ["dbrx-train", "train", *sys.argv[1:]]
cli.main()
"""


def main() -> None:
    program = PROGRAM.replace("{names}", repr(list(PARTS)))
    command = [sys.executable, "-X", "importtime", "-c", program, *sys.argv[1:]]
    done = subprocess.run(command, capture_output=True, text=True)
    marks = re.findall(r"^MARK (\S.*) ([\d.]+)$", done.stdout, re.M)
    if not marks:
        sys.exit(done.stderr[-2000:])
    # A mark names what begins there, but the first two, which name what has ended.
    names = ["command line", "imports", "configuration", *(PARTS.get(name, name) for name, _ in marks[2:])]
    names = [{"fit": "last preparations", "batch": "first step"}.get(name, name) for name in names]
    for name, (_, seconds) in zip(names, marks, strict=False):
        print(f"{float(seconds):7.2f} s  {name}")
    print(f"{sum(float(seconds) for _, seconds in marks):7.2f} s  in all\n")
    imports = re.findall(r"^import time:\s+\d+ \|\s+(\d+) \|  ?( *)(\S+)$", done.stderr, re.M)
    top = sorted(((int(us), name) for us, indent, name in imports if len(indent) <= 8), reverse=True)
    for us, name in top[:12]:
        print(f"{us / 1e6:7.2f} s  import {name}")


if __name__ == "__main__":
    main()
