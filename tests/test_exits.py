"""Standard output that is closed, full, of few letters, or not read: one line or none, and an exit code."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

MAIN = (sys.executable, "-m", "dbrx_train")


def shell(command: str, **environment: str) -> tuple[int, list[str]]:
    """The exit code of a command of bash, in which $MAIN is ours, and the lines on stderr."""
    env = {**os.environ, "MAIN": " ".join(MAIN), **environment}
    done = subprocess.run(["bash", "-c", command], env=env, capture_output=True, text=True, timeout=100)
    return done.returncode, done.stderr.splitlines()


@pytest.mark.parametrize(
    ("command", "code", "said"),
    [
        ("$MAIN data --help >&-", 0, []),
        ("$MAIN report nowhere >&- 2>&-", 2, []),
        ("$MAIN --version >/dev/full", 2, ["dbrx-train: No space left on device"]),
        ("set -o pipefail; $MAIN data --help | true", 1, []),
    ],
)
def test_what_becomes_of_standard_output(command: str, code: int, said: list[str]) -> None:
    if "/dev/full" in command and not Path("/dev/full").exists():
        pytest.skip("this system has no /dev/full")
    assert shell(command) == (code, said)


def test_letters_that_a_terminal_lacks_are_escaped() -> None:
    few = {"LC_ALL": "C", "PYTHONUTF8": "0", "PYTHONIOENCODING": "ascii", "PYTHONCOERCECLOCALE": "0"}
    program = "from dbrx_train import exits; exits.begin(); print('\\u2026')"
    assert shell(f'test "$({sys.executable} -c "{program}")" = \'\\u2026\'', **few) == (0, [])


def test_a_forked_process_hears_signals_as_any_does() -> None:
    program = (
        "import os, signal; from dbrx_train import exits; exits.begin(); child = os.fork();"
        "child or os.kill(os.getpid(), signal.SIGTERM);"
        "assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == -signal.SIGTERM"
    )
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, timeout=60)
    assert (done.returncode, done.stderr) == (0, "")
