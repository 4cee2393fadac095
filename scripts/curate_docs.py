"""Renew the reference of steps in docs/curate.md from their dataclasses: python scripts/curate_docs.py"""

from __future__ import annotations

import dataclasses
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parent.parent
sys.path.insert(0, str(ROOT))
TARGET = ROOT / "docs" / "curate.md"
BEGIN, END = "<!-- steps: python scripts/curate_docs.py -->\n", "<!-- end of steps -->"


def reference() -> Iterator[str]:
    from dbrx_train.data.curate.recipe import Source
    from dbrx_train.data.curate.step import Step
    from dbrx_train.data.curate.steps import STEPS

    common = {field.name for field in dataclasses.fields(Step)}
    yield from _table("a source", Source, "Documents under one name.", set())
    for name, step in STEPS.items():
        yield from _table(f"`{name}`", step, str(step.__doc__).split("\n\n")[0], common)


def _table(title: str, kind: Any, doc: str, without: set[str]) -> Iterator[str]:
    yield from ("", f"**{title}** {' '.join(doc.split())}", "", "| option | default | |", "|---|---|---|")
    for field in dataclasses.fields(kind):
        if field.name not in without:
            meaning = field.metadata["doc"]
            meaning = meaning[0].upper() + meaning[1:]
            yield f"| `{field.name}` | {_default(field)} | {meaning} |"


def _default(field: Any) -> str:
    if field.default_factory is not dataclasses.MISSING:
        values = ", ".join(map(str, field.default_factory()))
        return f"`[{values}]`"
    if field.default is dataclasses.MISSING:
        return "required"
    if field.default is None:
        return "null"
    return f"`{str(field.default).lower() if isinstance(field.default, bool) else field.default}`"


def renewed() -> str:
    """The page with its reference made anew."""
    page = TARGET.read_text(encoding="utf-8")
    before, _, rest = page.partition(BEGIN)
    _, _, after = rest.partition(END)
    return f"{before}{BEGIN}" + "\n".join(reference()) + f"\n\n{END}{after}"


if __name__ == "__main__":
    TARGET.write_text(renewed(), encoding="utf-8")
