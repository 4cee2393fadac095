"""A program for tests: a rank, among others, that fails.

torchrun --nproc-per-node N failing_rank.py RANK HOW: what rank RANK raises, or, where HOW is "stopped", a
signal to it, is to end the others, which wait in a collective, or are "computing".
"""

from __future__ import annotations

import os
import signal
import sys
import time

import torch
import torch.distributed as dist

from dbrx_train.resilience import propagate_failures

signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))  # as Composer does
dist.init_process_group("gloo")
rank, failing = dist.get_rank(), int(sys.argv[1])
with propagate_failures() as ending:
    ending.at_end = lambda code: os.write(1, f"rank {rank} tidied up\n".encode())
    if rank == failing:
        time.sleep(1)
        os.write(1, f"raised at {time.time()}\n".encode())
        if sys.argv[2] == "stopped":
            os.kill(os.getpid(), signal.SIGTERM)
        raise KeyError("no such shard")
    if sys.argv[2] == "computing":  # no collective tells such a rank that another is gone
        time.sleep(300)
    dist.all_reduce(torch.ones(1))
