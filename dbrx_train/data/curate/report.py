"""``curation.json``: what a curated folder holds and came from, what was removed; the mark that it is whole.

Equal inputs and recipe give an equal file, whoever did the work. Layout of a curated folder::

    DIR/curation.json                  written last
    DIR/SOURCE/00000.parquet           what is kept: id, text, metadata.FIELD, and the steps' columns
    DIR/.removed/SOURCE/00000.parquet  what is not: the same with reason and duplicate_of
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

from dbrx_train.data.curate.parts import EXAMPLES
from dbrx_train.data.curate.recipe import Recipe
from dbrx_train.data.curate.step import EMPTY
from dbrx_train.data.inputs import CURATION
from dbrx_train.data.manifest import write_json
from dbrx_train.data.prepare.problems import merge_problems
from dbrx_train.files import seal

__all__ = ["CURATION", "build_report", "read_report", "show", "write_report"]

VERSION = 1


def build_report(
    plan: Mapping[str, Any],
    recipe: Recipe,
    sources: Sequence[str],
    annotated: Sequence[Mapping[str, Any]],
    written: Sequence[Mapping[str, Any]],
    duplicates: tuple[str, ...],
) -> dict[str, Any]:
    """Add up what the parts gave.

    Args:
        plan: what decides the output.
        recipe: what was done.
        sources: of each part.
        annotated: of each part, as :func:`.parts.annotate_part` left it.
        written: of each part, as :func:`.parts.write_part` left it.
        duplicates: files that were named more than once.
    """
    parts = list(zip(sources, annotated, written, strict=True))
    problems = merge_problems((mark["problems"] for mark in annotated), duplicates)
    return {
        **plan,
        "sources": [
            _source(recipe, name, [(a, w) for source, a, w in parts if source == name])
            for name in recipe.sources
        ],
        "problems": {kind: asdict(problem) for kind, problem in problems.items()},
        "outputs": [mark["output"] for mark in written if mark["output"]["documents"]],
    }


def _source(recipe: Recipe, name: str, parts: list[tuple[Any, Any]]) -> dict[str, Any]:
    totals: dict[str, int] = {}
    rules: dict[str, dict[str, Any]] = {}
    for annotated, written in parts:
        for total, count in written["totals"].items():
            totals[total] = totals.get(total, 0) + count
        for rule, count in annotated["alone"].items():
            _rule(rules, rule)["alone"] += count
        for rule, found in written["removed"].items():
            entry = _rule(rules, rule)
            entry["documents"] += found["documents"]
            entry["bytes"] += found["bytes"]
            for group, count in found["by"].items():
                entry["by"][group] = entry["by"].get(group, 0) + count
            entry["examples"] = (entry["examples"] + found["examples"])[:EXAMPLES]
    order = [EMPTY]
    for step in recipe.steps_of(name):
        order += [rule.name for rule in step.rules()] or [f"{step.name}.duplicate"]
    return {
        "name": name,
        "documents": sum(a["documents"] for a, _ in parts),
        "bytes": sum(a["bytes"] for a, _ in parts),
        "kept_documents": sum(w["documents"] for _, w in parts),
        "kept_bytes": sum(w["bytes"] for _, w in parts),
        "totals": totals,
        "removed": [{"rule": rule, **rules[rule]} for rule in order if rule in rules],
    }


def _rule(rules: dict[str, dict[str, Any]], name: str) -> dict[str, Any]:
    """``alone``: documents that fail it, whatever else they fail; ``documents``: those that fail it first."""
    return rules.setdefault(name, {"alone": 0, "documents": 0, "bytes": 0, "by": {}, "examples": []})


def write_report(folder: Path, report: Mapping[str, Any]) -> None:
    """Write ``curation.json`` in one step: from then on the folder counts as whole."""
    write_json(folder / CURATION, {**report, "seal": seal(report)}, indent=2)


def read_report(folder: Path) -> dict[str, Any]:
    """The report of a curated folder; its ``seal`` names it.

    Raises:
        ValueError: there is none, or it is damaged.
    """
    path = folder / CURATION
    try:
        report = json.loads(path.read_text(encoding="utf-8"))
        found = report.get("seal")
        if found != seal({key: value for key, value in report.items() if key != "seal"}):
            raise ValueError("its content is not what was written")
        if report["version"] != VERSION:
            raise ValueError(f"version {report['version']}; this program reads version {VERSION}")
    except (ValueError, TypeError, KeyError, AttributeError) as error:
        raise ValueError(f"{path}: damaged ({error}); curate again") from error
    return dict(report)


def show(report: Mapping[str, Any]) -> list[str]:
    """The report in lines, for people."""
    lines = []
    for source in report["sources"]:
        share = source["kept_bytes"] / max(1, source["bytes"])
        lines.append(
            f"  {source['name']}: {source['kept_documents']:,} of {source['documents']:,} documents kept, "
            f"{source['kept_bytes'] / 1e6:,.1f} of {source['bytes'] / 1e6:,.1f} MB ({share:.1%})"
        )
        for rule in source["removed"]:
            if rule["documents"] or rule["alone"]:
                alone = f" ({rule['alone']:,} fail it)" if rule["alone"] > rule["documents"] else ""
                groups = sorted(rule["by"].items(), key=lambda item: (-item[1], item[0]))[:4]
                by = (
                    ": " + ", ".join(f"{group or 'none'} {count:,}" for group, count in groups)
                    if groups
                    else ""
                )
                lines.append(f"    {rule['rule']:<48} -{rule['documents']:,}{alone}{by}")
        for total, count in source["totals"].items():
            if count:
                lines.append(f"    {total:<48} {count:,}")
    for kind, problem in report["problems"].items():
        lines.append(f"  {kind}: {problem['count']:,} ({', '.join(problem['examples'])})")
    return lines
