"""Raw text -> curated Parquet, by a recipe, in parallel and resumable.

Two passes over parts that depend on the files alone, as in :mod:`..prepare.pipeline`: steps annotate each
document, then duplicates are found among all by their keys, then each part is written without what is gone.
Killed at any moment and started again, only what is unfinished is redone, and the output is the same, byte
for byte, on any engine.
"""

from __future__ import annotations

import json
import os
import shutil
import time
from collections import Counter
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path
from typing import Any

from dbrx_train.data.curate.corpus import find_duplicates
from dbrx_train.data.curate.parts import REMOVED, Job, annotate_part, write_part
from dbrx_train.data.curate.recipe import Recipe, load_recipe
from dbrx_train.data.curate.report import VERSION, build_report, read_report, show, write_report
from dbrx_train.data.inputs import CURATION
from dbrx_train.data.manifest import write_json
from dbrx_train.data.prepare.engines import check_engine, run_on
from dbrx_train.data.prepare.resumable import check_processes, claimed, has_marks, read_mark, remove_traces
from dbrx_train.data.prepare.sources import Catalog, Part, find_files, plan_parts
from dbrx_train.data.prepare.workers import Work
from dbrx_train.files import fingerprint
from dbrx_train.lease import FOLDER as LEASE

__all__ = ["Summary", "curate"]

WORK = ".curate"
_PLAN = "plan.json"


@dataclass(frozen=True)
class Summary:
    """What :func:`curate` did; ``str()`` of it is for people."""

    out: str
    report: dict[str, Any]
    """As in ``curation.json``."""
    already_done: bool
    """The folder was whole before, and nothing was done."""
    parts: int
    parts_resumed: int
    """Parts that an earlier, interrupted run had looked at."""
    seconds: float

    def __str__(self) -> str:
        lines = [f"{self.out}: already curated" if self.already_done else f"{self.out}: curated"]
        lines += show(self.report)
        if not self.already_done:
            resumed = (
                f", {self.parts_resumed} of {self.parts} parts from before" if self.parts_resumed else ""
            )
            lines.append(f"  in {self.seconds:.1f} s{resumed}; what was removed is in {REMOVED}")
        return "\n".join(lines)


def curate(
    recipe: str,
    out: str,
    *,
    processes: int | None = None,
    engine: str = "local",
    allow_empty: bool = False,
    progress: bool = True,
) -> Summary:
    """Clean, filter and deduplicate a recipe's sources into ``out/SOURCE``, which ``data prepare`` reads.

    Args:
        recipe: a YAML file, see :mod:`.recipe`.
        out: the folder to make; a run that was interrupted there is taken up again.
        processes: workers; None for one per CPU core. No influence on what is written.
        engine: who does the work, see :mod:`..prepare.engines`. No influence on what is written.
        allow_empty: accept that nothing is left of a source.
        progress: show a progress bar if standard error is a terminal.

    Raises:
        ValueError: the recipe or an input is wrong, nothing would be left of a source, ``out`` cannot be
            written, is in use, or holds something else (the message says what differs).
    """
    started = time.monotonic()
    check_processes(processes)
    check_engine(engine)
    read = load_recipe(recipe)
    folder = Path(out).absolute()
    job = Job(read, folder, folder / WORK)
    try:
        catalogs = {name: find_files(source.paths, source.suffixes) for name, source in read.sources.items()}
        plan = _plan(read, catalogs)
        if (folder / CURATION).is_file():
            return _already_done(folder, out, plan, started)
        begin = partial(_begin_or_resume, job, plan, _stats(catalogs))
        with claimed(folder, WORK, CURATION, "curation", begin) as lease:
            if (folder / CURATION).is_file():  # another process finished while this one waited
                return _already_done(folder, out, plan, started)
            parts = [
                (name, part)
                for name, catalog in catalogs.items()
                for part in plan_parts(catalog, read.sources[name].text)
            ]
            todo = _annotate(job, parts, engine, processes, progress)
            report = _finish(job, parts, plan, catalogs, (engine, processes, progress), allow_empty)
            lease.check()
            write_report(folder, report)
            remove_traces(folder, WORK)
    except OSError as error:
        raise ValueError(f"{error.filename or out}: {error.strerror or error}") from error
    seconds = time.monotonic() - started
    return Summary(out, read_report(folder), False, len(parts), len(parts) - todo, seconds)


Parts = Sequence[tuple[str, Part]]


def _annotate(job: Job, parts: Parts, engine: str, processes: int | None, progress: bool) -> int:
    """The first pass; returns of how many parts."""
    todo = [index for index in range(len(parts)) if read_mark(job.mark("part", index)) is None]
    if todo:
        _build(job)
    tasks = [partial(annotate_part, job, index, *parts[index]) for index in todo]
    size = sum(span.size for index in todo for span in parts[index][1])
    run_on(engine, Work(tasks, size, "curating", "documents", str(job.out)), processes, progress)
    return len(todo)


def _build(job: Job) -> None:
    """Make what the steps need; refuses what they cannot have."""
    for step in job.recipe.steps:
        try:
            step.build(job.work)
        except ModuleNotFoundError as error:
            raise ValueError(
                f"{step.name}: {error.name} is not installed; "
                f"this step needs: pip install 'dbrx-train[curate]'"
            ) from error


def _finish(
    job: Job,
    parts: Parts,
    plan: dict[str, Any],
    catalogs: dict[str, Catalog],
    how: tuple[str, int | None, bool],
    allow_empty: bool,
) -> dict[str, Any]:
    """Find the duplicates, and write what is kept: the second pass."""
    sources = [source for source, _ in parts]
    annotated = [_mark(job, "part", index) for index in range(len(parts))]
    removed = find_duplicates(job, sources, [mark["documents"] for mark in annotated])
    if not allow_empty:
        _refuse_empty(job, sources, annotated, removed)
    todo = [index for index in range(len(parts)) if read_mark(job.mark("written", index)) is None]
    tasks = [partial(write_part, job, index, sources[index]) for index in todo]
    size = sum(job.annotated(index).stat().st_size for index in todo if job.annotated(index).is_file())
    engine, processes, progress = how
    run_on(engine, Work(tasks, size, "writing", "documents", str(job.out)), processes, progress)
    written = [_mark(job, "written", index) for index in range(len(parts))]
    twice = tuple(path for catalog in catalogs.values() for path in catalog.duplicates)
    return build_report(plan, job.recipe, sources, annotated, written, twice)


def _mark(job: Job, stage: str, index: int) -> dict[str, Any]:
    found = read_mark(job.mark(stage, index))
    assert found is not None
    return found


def _refuse_empty(
    job: Job, sources: Sequence[str], annotated: Sequence[dict[str, Any]], removed: Sequence[Counter[str]]
) -> None:
    for name in job.recipe.sources:
        of = [index for index, source in enumerate(sources) if source == name]
        count = sum(annotated[index]["documents"] for index in of)
        reasons: Counter[str] = sum((removed[index] for index in of), Counter())
        if reasons.total() == count:
            _clear(job.out)
            shutil.rmtree(job.work)
            rules = ", ".join(f"{rule} removes {number:,}" for rule, number in reasons.most_common(5))
            why = rules or "there are no documents"
            raise ValueError(
                f"{job.recipe.path}: sources.{name}: nothing is left of {count:,} documents ({why}); "
                f"change these rules, or accept it with --allow-empty"
            )


def _plan(recipe: Recipe, catalogs: dict[str, Catalog]) -> dict[str, Any]:
    """What decides the output, as it goes into the report; JSON values only."""
    files = dict.fromkeys(file for step in recipe.steps for file in step.files())
    return {
        "version": VERSION,
        "recipe": recipe.values(),
        "recipe_digest": recipe.digest,
        "inputs": {name: [asdict(source) for source in found.sources] for name, found in catalogs.items()},
        "files": {file: fingerprint(Path(file))["xxh3"] for file in files},
    }


def _stats(catalogs: dict[str, Catalog]) -> dict[str, list[int]]:
    """Size and time of each input file, to name one that changes."""
    paths = [path for catalog in catalogs.values() for path, _ in catalog.files]
    return {path: [(status := os.stat(path)).st_size, status.st_mtime_ns] for path in paths}


def _refuse_differences(
    folder: Path, before: dict[str, Any], now: dict[str, Any], changed: Sequence[str] = ()
) -> None:
    """Raise ValueError, with what differs, unless both plans give the same output."""
    found = []
    if before["recipe"] != now["recipe"]:
        found.append(f"the recipe differs ({_first_difference(before['recipe'], now['recipe'])})")
    else:
        found += [f"{file} has changed" for file in changed]
        was, new = before["files"], now["files"]
        found += [f"{file} has changed" for file in new if was.get(file) != new[file]]
        for name, sources in now["inputs"].items():
            for old, source in zip(before["inputs"][name], sources, strict=True):
                if old != source and not changed:
                    found.append(
                        f"{source['given']} of source {name} has changed ({old['files']} files of "
                        f"{old['bytes']} bytes then, {source['files']} of {source['bytes']} now; names, "
                        f"sizes and times count)"
                    )
        if not found and before != now:
            found.append("an evaluation file or a model is no longer there")
    if found:
        shown = "; ".join(found[:3]) + ("; …" if len(found) > 3 else "")
        raise ValueError(f"{folder}: was begun otherwise: {shown}; delete it or choose another --out")


def _first_difference(before: Any, now: Any, key: str = "") -> str:
    """The first key that differs, with both values."""
    if isinstance(before, dict) and isinstance(now, dict) and before.keys() == now.keys():
        name = next(name for name in now if before[name] != now[name])
        return _first_difference(before[name], now[name], f"{key}.{name}" if key else name)
    if isinstance(before, list) and isinstance(now, list) and len(before) == len(now):
        at = next(at for at in range(len(now)) if before[at] != now[at])
        return _first_difference(before[at], now[at], f"{key}[{at}]")
    if isinstance(before, dict | list):
        return f"{key} has other entries"
    return f"{key} was {before!r} and is {now!r}"


def _already_done(folder: Path, out: str, plan: dict[str, Any], started: float) -> Summary:
    report = read_report(folder)
    _refuse_differences(folder, {key: report[key] for key in plan}, plan)
    remove_traces(folder, WORK)  # a run may have been killed just before it did
    return Summary(out, report, True, 0, 0, time.monotonic() - started)


def _begin_or_resume(job: Job, plan: dict[str, Any], stats: dict[str, list[int]]) -> None:
    """Make sure that finished parts are of this plan; where there are none, any plan may begin."""
    file = job.work / _PLAN
    if has_marks(job.work):
        before = json.loads(file.read_text(encoding="utf-8"))
        old = before.pop("stats")
        changed = [path for path in dict.fromkeys([*old, *stats]) if old.get(path) != stats.get(path)]
        _refuse_differences(job.out, before, plan, changed)
    else:
        _clear(job.out)
        job.work.mkdir(exist_ok=True)
        write_json(file, {**plan, "stats": stats})


def _clear(folder: Path) -> None:
    """Remove what an earlier try wrote."""
    for path in folder.iterdir():
        if path.name not in (WORK, LEASE) and path.is_dir():
            shutil.rmtree(path)
