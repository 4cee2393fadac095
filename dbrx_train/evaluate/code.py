"""Programs that a model completes, and whether they pass their tests: HumanEval (arXiv 2107.03374)."""

from __future__ import annotations

import math
import re
import secrets
from dataclasses import dataclass

from dbrx_train.evaluate.sandbox import Ended, Sandbox

__all__ = ["Problem", "completion", "judge", "pass_at_k"]


@dataclass(frozen=True)
class Problem:
    """What a completion is tested by."""

    prompt: str
    test: str
    """Code that defines ``check(candidate)``."""
    entry_point: str
    """The name of the function that is tested."""


def completion(text: str) -> str:
    """What was written up to the next thing at the margin, which is no part of the function any more."""
    return re.split(r"\n[A-Za-z0-9#`]", text)[0]


def judge(problem: Problem, text: str, sandbox: Sandbox) -> tuple[bool, str]:
    """Whether a completion passes all tests, and if not, why.

    It counts once the program has come to its end: to exit with 0 before the tests passes none.
    """
    end = secrets.token_hex(16)
    parts = (
        problem.prompt + completion(text),
        problem.test,
        f"check({problem.entry_point})",
        f"print('\\n{end}')\n",
    )
    ended = sandbox.run("\n".join(parts))
    if ended.code == 0 and ended.out.endswith(f"\n{end}\n"):
        return True, "passed"
    return False, _reason(ended)


def _reason(ended: Ended) -> str:
    if ended.code is None:
        return "its time was over"
    if ended.code == 0:
        return "ended before its tests"
    lines = ended.err.strip().splitlines()
    return lines[-1] if lines else f"exit code {ended.code}"


def pass_at_k(samples: int, passed: int, k: int) -> float:
    """The unbiased estimate of the probability that one of k samples passes, of ``samples`` that were drawn:
    1 - C(samples - passed, k) / C(samples, k) (arXiv 2107.03374, equation 1)."""
    assert 0 < k <= samples
    return 1.0 - math.comb(samples - passed, k) / math.comb(samples, k)
