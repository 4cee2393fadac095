"""Between the two passes over the documents: duplicates among all of them, found by their keys alone."""

from __future__ import annotations

import os
import tempfile
from collections import Counter
from collections.abc import Sequence
from itertools import pairwise

import numpy as np
from numpy.typing import NDArray

from dbrx_train.data.curate.parts import Job
from dbrx_train.data.curate.step import CorpusStep

__all__ = ["find_duplicates"]


def find_duplicates(job: Job, sources: Sequence[str], counts: Sequence[int]) -> list[Counter[str]]:
    """Write beside each part which of its documents are duplicates.

    Of equal ones the first is kept, in the order of the sources in the recipe and of the documents in each;
    so nothing depends on who looked at which part, or when.

    Args:
        job: whose parts are annotated.
        sources: of each part.
        counts: documents of each part.

    Returns:
        For each part, how many documents are removed for which reason, other rules' included.
    """
    import pyarrow.parquet as pq

    bounds = np.concatenate([[0], np.cumsum(counts, dtype=np.int64)]).astype(np.int64)
    reasons = np.zeros(int(bounds[-1]), np.int32)
    names = [""]
    numbers = {"": 0}
    for index, (begin, end) in enumerate(pairwise(bounds)):
        if end > begin:
            found = pq.read_table(job.annotated(index), columns=["reason"])["reason"].combine_chunks()
            for name in found.unique().to_pylist():
                if name is not None and name not in numbers:
                    numbers[name] = len(names)
                    names.append(name)
            reasons[begin:end] = [numbers[name or ""] for name in found.to_pylist()]
    originals = np.full(len(reasons), -1, np.int64)
    for step in job.recipe.steps:
        if isinstance(step, CorpusStep):
            names.append(f"{step.name}.duplicate")
            subject = _subject(step, sources, bounds, reasons)
            removed, kept = _duplicates(job, step, subject, bounds)
            reasons[subject[removed]] = len(names) - 1
            originals[subject[removed]] = subject[kept]
    _write(job, bounds, [names[reason] for reason in reasons[originals >= 0]], originals)
    return [
        Counter(
            {names[reason]: int(count) for reason, count in enumerate(np.bincount(reasons[b:e])) if reason}
        )
        for b, e in pairwise(bounds)
    ]


def _subject(
    step: CorpusStep, sources: Sequence[str], bounds: NDArray[np.int64], reasons: NDArray[np.int32]
) -> NDArray[np.int64]:
    """The documents that a step looks at: those of its sources that nothing has removed."""
    looked_at = [step.looks_at(source) for source in sources]
    return np.flatnonzero(np.repeat(looked_at, np.diff(bounds)) & (reasons == 0))


def _duplicates(
    job: Job, step: CorpusStep, subject: NDArray[np.int64], bounds: NDArray[np.int64]
) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
    """Which of the documents are removed, and for which others: the keys go through a file, not memory."""
    import pyarrow.parquet as pq

    none = np.empty(0, np.int64)
    with tempfile.TemporaryFile(dir=job.work) as file:
        width = 0
        for index in range(len(bounds) - 1):
            begin, end = np.searchsorted(subject, bounds[index : index + 2])
            rows = subject[begin:end] - bounds[index]
            if not len(rows):
                continue
            keys = pq.read_table(job.annotated(index), columns=[step.key])[step.key].combine_chunks()
            width = keys.type.byte_width
            start = keys.offset * width
            data = np.frombuffer(keys.buffers()[1], np.uint8)[start : start + len(keys) * width]
            file.write(data.reshape(-1, width)[rows].tobytes())
        if not width:
            return none, none
        file.flush()
        os.fsync(file.fileno())
        return step.duplicates(np.memmap(file, np.uint8, "r", shape=(len(subject), width)))


def _write(job: Job, bounds: NDArray[np.int64], reasons: list[str], originals: NDArray[np.int64]) -> None:
    """A file for each part that has duplicates: the row, the reason, and the id of the one that is kept."""
    import pyarrow as pa
    import pyarrow.parquet as pq

    removed = np.flatnonzero(originals >= 0)
    ids = _ids(job, bounds, originals[removed])
    parts = np.searchsorted(bounds, removed, side="right") - 1
    for index in range(len(bounds) - 1):
        job.duplicates(index).unlink(missing_ok=True)
        of = range(*np.searchsorted(parts, (index, index + 1)).tolist())
        if len(of):
            table = {
                "row": removed[of.start : of.stop] - bounds[index],
                "reason": [reasons[i] for i in of],
                "duplicate_of": [ids[i] for i in of],
            }
            pq.write_table(pa.table(table), job.duplicates(index))


def _ids(job: Job, bounds: NDArray[np.int64], documents: NDArray[np.int64]) -> list[str]:
    """The ids of documents; those of a part at a time are read."""
    import pyarrow.parquet as pq

    ids = [""] * len(documents)
    parts = np.searchsorted(bounds, documents, side="right") - 1
    for index in np.unique(parts):
        column = pq.read_table(job.annotated(int(index)), columns=["id"])["id"]
        for at in np.flatnonzero(parts == index):
            ids[at] = column[int(documents[at] - bounds[index])].as_py()
    return ids
