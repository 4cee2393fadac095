"""Renews what the files of configs/pretrain say of their plans: python scripts/pretrain_plans.py

For each cluster the plan as configured or, where another mesh is clearly quicker, with what makes that.
"""

from __future__ import annotations

import re
import textwrap
import warnings
from dataclasses import replace
from pathlib import Path

from dbrx_train.config import ConfigError, RunConfig, load
from dbrx_train.plan.planner import Plan, held, plan
from dbrx_train.plan.search import changes, search

FOLDER = Path(__file__).parent.parent / "configs" / "pretrain"
CLUSTERS = (8, 64, 512, 3072)
HEAD = "# Planned for H100s in machines of 8, steps ± 25 % (renewed by scripts/pretrain_plans.py):\n"
MOST, SKEW = 60e9, 1.5
"""Bytes that a rank of another mesh may hold, and how many times the mean of tokens its experts may get: it
must still fit then, for before routers are balanced, loads differ."""
WORTH = 0.97
"""Of the step as configured: what another mesh may take at most to be named."""


def line(config: RunConfig, gpus: int) -> str | None:
    """What to say of a cluster; None if nothing fits it."""
    others = (each for each in search(config, gpus) if each.held.total <= MOST)
    best = next(filter(_is_safe, others), None)
    try:
        found: Plan | None = plan(config, gpus)
    except ConfigError:
        found = None
    if found is None or not _is_safe(found) or (best and best.step.total < WORTH * found.step.total):
        found = best
    if found is None:
        return None
    told = f"{gpus:>4} GPUs: step {found.step.total:.3g} s, MFU {100 * found.mfu(causal=False):.0f} %, "
    told += f"{found.held.total / 1e9:.0f} GB a rank, limit {found.limit}"
    if changed := changes(config, found):
        told += f"; with {' '.join(changed)}"
    wrapped = textwrap.wrap(told, 104, subsequent_indent=" " * 11, break_on_hyphens=False)
    return "".join(f"#   {each}\n" for each in wrapped)


def _is_safe(found: Plan) -> bool:
    config = found.config
    skewed = replace(config, plan=replace(config.plan, imbalance=SKEW))
    return held(skewed, found.gpus).total <= found.room


def renewed(path: Path) -> str:
    """The file with its plans as they should be, after the comment that it begins with."""
    text, config = path.read_text(encoding="utf-8"), load(path)
    text = re.sub(re.escape(HEAD) + r"(#   .*\n)*", "", text)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        lines = [said for gpus in CLUSTERS if (said := line(config, gpus)) is not None]
    first = re.match(r"(#.*\n)*", text)
    assert first is not None
    return first[0] + HEAD + "".join(lines) + text[first.end() :]


if __name__ == "__main__":
    for path in sorted(FOLDER.glob("*.yaml")):
        path.write_text(renewed(path), encoding="utf-8")
