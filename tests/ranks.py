"""What a process must know to be a rank on this machine, for tests that start ranks themselves."""

from __future__ import annotations

import socket


def free_port() -> int:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        return int(free.getsockname()[1])


def places(rank: int, ranks: int, port: int) -> dict[str, str]:
    """The variables that torch and Composer ask for, as torchrun sets them."""
    here = {"RANK": rank, "LOCAL_RANK": rank, "WORLD_SIZE": ranks, "LOCAL_WORLD_SIZE": ranks, "NODE_RANK": 0}
    rendezvous = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
    return {name: str(value) for name, value in here.items()} | rendezvous
