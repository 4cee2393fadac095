"""What a process must know to be a rank on this machine, for tests that start ranks themselves."""

from __future__ import annotations

import os
import socket
import subprocess
import sys


def free_port() -> int:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        return int(free.getsockname()[1])


def places(rank: int, ranks: int, port: int) -> dict[str, str]:
    """The variables that torch and Composer ask for, as torchrun sets them."""
    here = {"RANK": rank, "LOCAL_RANK": rank, "WORLD_SIZE": ranks, "LOCAL_WORLD_SIZE": ranks, "NODE_RANK": 0}
    rendezvous = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
    return {name: str(value) for name, value in here.items()} | rendezvous


def torchrun(ranks: int, *arguments: str) -> str:
    """What a program prints that torchrun starts on so many ranks of this machine."""
    launch = [sys.executable, "-m", "torch.distributed.run", f"--nproc-per-node={ranks}"]
    done = subprocess.run(
        [*launch, f"--master-port={free_port()}", *arguments],
        env={**os.environ, "OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
        timeout=400,
    )
    assert done.returncode == 0, done.stderr[-9000:]
    return done.stdout
