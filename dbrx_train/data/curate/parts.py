"""A part of the input, annotated and, once the duplicates among all are known, written: workers' tasks."""

from __future__ import annotations

import os
import uuid
from collections import Counter
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import xxhash

from dbrx_train.data.curate.batch import Batch
from dbrx_train.data.curate.recipe import Recipe
from dbrx_train.data.curate.rows import batches
from dbrx_train.data.curate.step import CorpusStep, Step, decide, judge
from dbrx_train.data.manifest import write_json
from dbrx_train.data.prepare.problems import ProblemLog
from dbrx_train.data.prepare.sources import Part
from dbrx_train.data.prepare.workers import Meter

__all__ = ["EXAMPLES", "REMOVED", "Job", "annotate_part", "write_part"]

REMOVED = ".removed"
"""The folder of what was removed; hidden, so that nobody reads it with what was kept."""
EXAMPLES = 3
"""Documents shown of each rule that removed some."""
_EXCERPT = 160


@dataclass(frozen=True)
class Job:
    """What is the same for every part."""

    recipe: Recipe
    out: Path
    work: Path

    def mark(self, stage: str, index: int) -> Path:
        """The file that says that a stage of a part is done, and what it gave."""
        return self.work / f"{stage}-{index:05}.json"

    def annotated(self, index: int) -> Path:
        """The part's documents with what the steps say of them."""
        return self.work / f"part-{index:05}.parquet"

    def duplicates(self, index: int) -> Path:
        """Which of the part's documents are duplicates."""
        return self.work / f"duplicates-{index:05}.parquet"


def annotate_part(job: Job, index: int, source: str, part: Part, meter: Meter) -> None:
    """Let the source's steps look at the part's documents, and mark it as done, last."""
    steps, log = job.recipe.steps_of(source), ProblemLog(meter)
    count = size = 0
    alone: Counter[str] = Counter()
    with _parquet(job.annotated(index)) as write:
        for table in batches(part, job.recipe.sources[source], log):
            batch = Batch(table)
            size += sum(len(text.encode()) for text in batch.texts)
            for step in steps:
                batch = step.annotate(batch, job.work)
            failed = judge(batch, steps)
            alone.update({rule: int(fails.sum()) for rule, fails in failed.items()})
            write(batch.with_columns({"reason": _strings(decide(failed, len(batch)))}).table)
            count += len(batch)
            meter.add(made=len(batch))
    found = {"documents": count, "bytes": size, "alone": alone, "problems": log.problems}
    write_json(job.mark("part", index), found)


def _strings(values: Sequence[str | None]) -> Any:
    import pyarrow as pa

    return pa.array(values, pa.string())


@contextmanager
def _parquet(path: Path) -> Iterator[Any]:
    """A function that adds a batch to the file, which is there whole or not at all; none without batches."""
    import pyarrow.parquet as pq

    writer, partial = None, path.with_name(f"{path.name}.{uuid.uuid4().hex}.tmp")

    def write(table: Any) -> None:
        nonlocal writer
        if writer is None:
            path.parent.mkdir(parents=True, exist_ok=True)
            writer = pq.ParquetWriter(partial, table.schema, compression="zstd")
        writer.write(table)

    try:
        yield write
        if writer is not None:
            writer.close()
            os.replace(partial, path)
    except BaseException:
        with suppress(OSError):
            if writer is not None:
                writer.close()
        raise
    finally:
        partial.unlink(missing_ok=True)


def write_part(job: Job, index: int, source: str, meter: Meter) -> None:
    """Write what is kept of the part, and apart from it what is removed and why; mark it as done, last."""
    import pyarrow.compute as pc
    import pyarrow.parquet as pq

    steps = job.recipe.steps_of(source)
    keys = [step.key for step in steps if isinstance(step, CorpusStep)]
    tally = _Tally(steps)
    path = Path(source, f"{index:05}.parquet")
    (job.out / path).unlink(missing_ok=True)  # of an interrupted try
    (job.out / REMOVED / path).unlink(missing_ok=True)
    if job.annotated(index).is_file():
        found = pq.read_table(job.duplicates(index)).to_pylist() if job.duplicates(index).is_file() else []
        duplicates = {row["row"]: (row["reason"], row["duplicate_of"]) for row in found}
        row = 0
        with _parquet(job.out / path) as keep, _parquet(job.out / REMOVED / path) as remove:
            annotated = pq.ParquetFile(job.annotated(index))
            for group in range(annotated.num_row_groups):
                table = annotated.read_row_group(group)
                table, row = _with_duplicates(table, duplicates, row), row + table.num_rows
                kept = table.column("reason").is_null()
                if (removed := table.filter(pc.invert(kept))).num_rows:
                    remove(removed.drop_columns(keys))
                    tally.remove(removed)
                if (rest := table.filter(kept)).num_rows:
                    keep(rest.drop_columns([*keys, "reason", "duplicate_of"]))
                    tally.keep(rest)
                meter.add(size=table.nbytes, made=table.num_rows)
    content = (job.out / path).read_bytes() if tally.documents else b""
    output = {"path": str(path), "documents": tally.documents, "xxh3": xxhash.xxh3_128_hexdigest(content)}
    write_json(job.mark("written", index), tally.values() | {"output": output})


def _with_duplicates(table: Any, duplicates: dict[int, tuple[str, str]], first: int) -> Any:
    """The batch with the reasons of those that are duplicates, and of which document."""
    reasons = table.column("reason").to_pylist()
    originals: list[str | None] = [None] * len(reasons)
    for at in range(len(reasons)):
        if first + at in duplicates:
            reasons[at], originals[at] = duplicates[first + at]
    at = table.schema.get_field_index("reason")
    return table.set_column(at, "reason", _strings(reasons)).append_column(
        "duplicate_of", _strings(originals)
    )


class _Tally:
    """Counts and examples of what a part kept and removed."""

    def __init__(self, steps: Sequence[Step]) -> None:
        self.columns = {rule.name: rule.column for step in steps for rule in step.rules()}
        self.by = {rule.name: rule.by for step in steps for rule in step.rules() if rule.by}
        self.documents = self.bytes = 0
        self.totals = {name: 0 for step in steps for name in step.totals}
        self.removed: dict[str, dict[str, Any]] = {}

    def keep(self, table: Any) -> None:
        self.documents += table.num_rows
        self.bytes += _text_bytes(table)
        for name in self.totals:
            self.totals[name] += int(np.asarray(table.column(name)).sum())

    def remove(self, table: Any) -> None:
        for row in table.to_pylist():
            reason, text = row["reason"], row["text"]
            entry = self.removed.setdefault(reason, {"documents": 0, "bytes": 0, "by": {}, "examples": []})
            entry["documents"] += 1
            entry["bytes"] += len(text.encode())
            if reason in self.by:
                group = row[self.by[reason]]
                entry["by"][group] = entry["by"].get(group, 0) + 1
            if len(entry["examples"]) < EXAMPLES:
                entry["examples"].append(self._example(row))

    def _example(self, row: dict[str, Any]) -> dict[str, Any]:
        example = {"id": row["id"], "text": row["text"][:_EXCERPT]}
        if row["duplicate_of"] is not None:
            example["duplicate_of"] = row["duplicate_of"]
        elif row["reason"] in self.columns:
            own = f"{row['reason'].partition('.')[0]}."
            named = [self.columns[row["reason"]], self.by.get(row["reason"]), f"{own}shared"]
            example |= {name: row[name] for name in named if name in row}
        return example

    def values(self) -> dict[str, Any]:
        return {
            "documents": self.documents,
            "bytes": self.bytes,
            "totals": self.totals,
            "removed": self.removed,
        }


def _text_bytes(table: Any) -> int:
    import pyarrow.compute as pc

    return int(pc.sum(pc.binary_length(table.column("text"))).as_py() or 0)
