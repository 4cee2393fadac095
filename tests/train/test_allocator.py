"""Freed memory is used again."""

from __future__ import annotations

import subprocess
import sys

import pytest

PROGRAM = """
import resource, sys
import torch
from dbrx_train.train.allocator import keep_freed_memory

if sys.argv[1] == "keep":
    keep_freed_memory()
for _ in range(12):  # for the first few, glibc keeps a splinter between a block and the next one
    before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
    torch.ones(2**24).sum()  # 64 MiB
print(resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before)
"""


def faults(how: str) -> int:
    """Pages that the system had to bring for a tensor of a size that was freed before."""
    command = [sys.executable, "-c", PROGRAM, how]
    return int(subprocess.run(command, capture_output=True, text=True, check=True, timeout=120).stdout)


@pytest.mark.slow
@pytest.mark.skipif(sys.platform != "linux", reason="of glibc")
def test_a_freed_block_is_used_again() -> None:
    assert faults("keep") < faults("give back") / 16
