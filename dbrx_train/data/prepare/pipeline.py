"""Text, JSON lines or Parquet -> tokenized MDS shards, in parallel and resumable.

The input is cut into parts that depend on the files alone (:mod:`.sources`); each part is tokenized by
one process into its own sub-folder and marked done (:mod:`.tokenize`); at the end the parts' indexes are
merged, the tokens that the parts left over are packed into samples of their own, and the manifest is
written (:mod:`.manifest`). Killed at any moment and started again, only unfinished parts are redone, and
the output is the same, byte for byte, whatever happened and however many processes took part.
"""

from __future__ import annotations

import json
import shutil
import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

from dbrx_train.data.governance import Governance
from dbrx_train.data.inputs import keep_curations, keep_inputs
from dbrx_train.data.manifest import (
    MANIFEST,
    VERSION,
    WORK,
    Manifest,
    Split,
    read_manifest,
    write_json,
    write_manifest,
)
from dbrx_train.data.mds import write_index
from dbrx_train.data.prepare.conversations import ChatFormat
from dbrx_train.data.prepare.engines import check_engine, run_on
from dbrx_train.data.prepare.holding_out import is_stale, kept_fraction, raise_fraction
from dbrx_train.data.prepare.problems import merge_problems
from dbrx_train.data.prepare.resumable import check_processes, claimed, has_marks, read_mark, remove_traces
from dbrx_train.data.prepare.sources import Catalog, Part, find_files, plan_parts
from dbrx_train.data.prepare.text_template import text_template
from dbrx_train.data.prepare.tokenize import SPLITS, Job, run_part
from dbrx_train.data.prepare.workers import Work
from dbrx_train.data.tokenizer import Tokenizer, load_tokenizer

__all__ = ["TEXT_SUFFIXES", "Summary", "prepare"]

TEXT_SUFFIXES = (".txt", ".md", ".py")
REST = "rest"


@dataclass(frozen=True)
class Summary:
    """What :func:`prepare` did; ``str()`` of it is for people."""

    out: str
    manifest: Manifest
    already_done: bool
    """The folder was whole before, and nothing was done."""
    parts: int
    parts_resumed: int
    """Parts that an earlier, interrupted run had finished."""
    seconds: float

    def __str__(self) -> str:
        lines = [f"{self.out}: already prepared" if self.already_done else f"{self.out}: prepared"]
        chat = self.manifest.chat is not None
        for name, split in self.manifest.splits.items():
            documents = "conversations" if chat else "documents"
            room = f"{split.dropped_tokens:,} tokens at the end fill none"
            if chat:
                room = f"{1 - split.tokens / (split.samples * self.manifest.seq_len):.1%} padding"
            lines.append(
                f"  {name}: {split.documents:,} {documents}, {split.tokens:,} tokens, {split.samples:,} "
                f"samples of {self.manifest.seq_len:,} ({room})"
            )
        if self.manifest.options["val_fraction"] and "val" not in self.manifest.splits:
            lines.append("  val: nothing; --val-fraction holds out whole documents, and these are few")
        for kind, problem in self.manifest.problems.items():
            examples = ", ".join(problem.examples) + (", …" if problem.count > len(problem.examples) else "")
            lines.append(f"  {kind}: {problem.count:,} ({examples})")
        if self.manifest.governance:
            lines.append(f"  {self.manifest.governance}")
        if not self.already_done:
            resumed = (
                f", {self.parts_resumed} of {self.parts} parts from before" if self.parts_resumed else ""
            )
            lines.append(f"  in {self.seconds:.1f} s{resumed}")
        return "\n".join(lines)


def prepare(
    sources: Sequence[str],
    out: str,
    *,
    seq_len: int = 2048,
    text_field: str = "text",
    template: str | None = None,
    suffixes: Sequence[str] = TEXT_SUFFIXES,
    val_fraction: float = 0.01,
    processes: int | None = None,
    tokenizer: str = "cl100k_base",
    vocab_file: str | None = None,
    progress: bool = True,
    chat: ChatFormat | None = None,
    engine: str = "local",
    governance: Governance | None = None,
) -> Summary:
    """Tokenize documents and pack them into samples of ``seq_len`` tokens, as MDS under ``out``.

    ``<|endoftext|>`` follows each document, and samples run across documents. Each document goes to
    ``out/train`` or ``out/val`` by a hash of its beginning (64 Ki characters), so that it stays where it
    is when others are added, and equal documents stay together. Parts of the input are packed apart;
    what they leave over is packed at the end, and only the last tokens of all, fewer than ``seq_len`` per
    split, are dropped (and counted). Memory does not grow with the corpus or with a document.

    Blank documents are skipped, bytes that are no UTF-8 become U+FFFD, and files named twice are read
    once: each is counted, and its first places named, in the summary and the manifest.

    With ``chat``, sources are JSON or Parquet with conversations (:mod:`.chat_rows`): they are packed whole,
    none is cut across samples, and a loss mask goes with the tokens. A conversation goes to a split by the
    hash of what comes before the first answer.

    Args:
        sources: files, folders (recursively) and globs: text, ``.jsonl`` (one document a line),
            ``.parquet`` (one a row) and, where it is named, ``.json`` (one an element of the array, or a
            line); text and JSON also as ``.gz`` or ``.zst``.
        out: the folder to make; a run that was interrupted there is taken up again.
        seq_len: tokens per sample.
        text_field: field or column that holds the text; ``a.b`` is field b of field a.
        template: text made of several fields instead, like ``{title}\\n\\n{body}``.
        suffixes: endings of files that are one text document each.
        val_fraction: share of the documents held out, in [0, 1]: enough of them for a sample, if any; 1 makes
            a folder of held-out documents alone, for ``val`` of another source.
        processes: workers; None for one per CPU core. No influence on what is written.
        tokenizer: name of the vocabulary.
        vocab_file: a vocabulary file to use instead, see :func:`.tokenizer.load_tokenizer`.
        progress: show a progress bar if standard error is a terminal.
        chat: how to read and train on conversations; None for text.
        engine: who does the work, see :mod:`.engines`. No influence on what is written.
        governance: licence, owner, terms and allowed uses, for the manifest; of a folder that is whole they
            are changed without preparing it again.

    Raises:
        ValueError: an option or an input is wrong, ``out`` cannot be written, is in use, or holds something
            else (the message says what differs).
    """
    started, governance = time.monotonic(), governance or Governance()
    _check_options(seq_len, val_fraction, processes, engine)
    text = text_template(text_field, template)
    vocabulary = load_tokenizer(tokenizer, vocab_file)
    folder = Path(out)
    try:
        catalog = find_files(sources, suffixes if chat is None else ())
        options: dict[str, Any] = {"seq_len": seq_len, "val_fraction": val_fraction}
        if chat is None:
            chosen = {"text_field": text_field} if template is None else {"template": template}
            options |= chosen | {"suffixes": list(suffixes)}
        else:
            options |= {"chat": asdict(chat)}
        plan = _describe(catalog, vocabulary, options)
        if (folder / MANIFEST).is_file():
            return _already_done(folder, plan, governance, started)
        begin = partial(_begin_or_resume, folder, plan)
        with claimed(folder, WORK, MANIFEST, "preparation", begin) as lease:
            if (folder / MANIFEST).is_file():  # another process finished while this one waited
                return _already_done(folder, plan, governance, started)
            parts = plan_parts(catalog, text if chat is None else None)
            raised = kept_fraction(folder / WORK)
            job = Job(folder, folder / WORK, vocabulary, seq_len, text, raised or val_fraction, chat)
            run = partial(_run_parts, parts=parts, engine=engine, processes=processes, progress=progress)
            made = run(job)
            if raised is None and 0 < val_fraction < 1:
                marks = [mark for i in range(len(parts)) if (mark := read_mark(job.mark(i))) is not None]
                raised = raise_fraction(job.work, marks, needs=seq_len if chat is None else 1)
                if raised is not None:
                    run(replace(job, val_fraction=raised))
            lease.check()
            manifest = _finish(job, len(parts), catalog, plan, governance)
            _remove_traces(folder)
    except OSError as error:
        raise ValueError(f"{error.filename or out}: {error.strerror or error}") from error
    seconds = time.monotonic() - started
    return Summary(out, manifest, False, len(parts), len(parts) - made, seconds)


def _run_parts(job: Job, parts: Sequence[Part], engine: str, processes: int | None, progress: bool) -> int:
    """Make the parts that are not done, or train on what is to be held out; says how many these were."""
    marks = [read_mark(job.mark(index)) for index in range(len(parts))]
    todo = [i for i, mark in enumerate(marks) if mark is None or is_stale(mark, job.val_fraction)]
    size = sum(span.size for index in todo for span in parts[index])
    tasks = [partial(run_part, job, index, parts[index]) for index in todo]
    run_on(engine, Work(tasks, size, "tokenizing", "tokens", str(job.out)), processes, progress)
    return len(todo)


def _check_options(seq_len: int, val_fraction: float, processes: int | None, engine: str) -> None:
    if seq_len < 2:
        raise ValueError(f"seq_len: {seq_len} is too short; a sample needs at least 2 tokens")
    if not 0 <= val_fraction <= 1:
        raise ValueError(f"val_fraction: {val_fraction} does not lie in [0, 1]")
    check_processes(processes)
    check_engine(engine)


def _describe(catalog: Catalog, tokenizer: Tokenizer, options: dict[str, Any]) -> dict[str, Any]:
    """What decides the output, as it goes into the manifest; JSON values only."""
    return {
        "version": VERSION,
        "tokenizer": tokenizer.name,
        "tokenizer_fingerprint": tokenizer.fingerprint,
        "vocab_size": tokenizer.vocab_size,
        "options": options,
        "sources": [asdict(source) for source in catalog.sources],
    }


def _differences(before: dict[str, Any], now: dict[str, Any]) -> list[str]:
    """What differs between two descriptions, for people."""
    flat_before, flat_now = ({**plan, **plan["options"]} for plan in (before, now))
    keys = [key for key in (*now, *before["options"], *now["options"]) if key not in ("options", "sources")]
    found = [
        f"{key} was {flat_before.get(key)!r} and is {flat_now.get(key)!r}"
        for key in dict.fromkeys(keys)
        if flat_before.get(key) != flat_now.get(key)
    ]
    names_before, names_now = ([source["given"] for source in plan["sources"]] for plan in (before, now))
    if names_before != names_now:
        found.append(f"sources were {' '.join(names_before)} and are {' '.join(names_now)}")
        return found
    for was, source in zip(before["sources"], now["sources"], strict=True):
        if was != source:
            found.append(
                f"source {source['given']} has changed ({was['files']} files of {was['bytes']} bytes then, "
                f"{source['files']} of {source['bytes']} now; names, sizes and times count)"
            )
    return found


def _refuse_differences(folder: Path, before: dict[str, Any], now: dict[str, Any]) -> None:
    if found := _differences(before, now):
        raise ValueError(
            f"{folder}: was begun otherwise: {'; '.join(found)}; delete it or choose another --out"
        )


def _already_done(folder: Path, plan: dict[str, Any], governance: Governance, started: float) -> Summary:
    manifest = read_manifest(folder)
    _refuse_differences(folder, asdict(manifest), plan)
    if (updated := manifest.governance.updated(governance)) != manifest.governance:
        manifest = replace(manifest, governance=updated)
        write_manifest(folder, manifest)
    _remove_traces(folder)  # a run may have been killed just before it did
    return Summary(str(folder), manifest, True, 0, 0, time.monotonic() - started)


def _begin_or_resume(folder: Path, plan: dict[str, Any]) -> None:
    """Make sure that finished parts are of this plan; where there are none, any plan may begin."""
    work = folder / WORK
    plan_file = work / "plan.json"
    if has_marks(work):
        _refuse_differences(folder, json.loads(plan_file.read_text(encoding="utf-8")), plan)
    else:
        _clear(folder)
        work.mkdir(exist_ok=True)
        write_json(plan_file, plan)


def _remove_traces(folder: Path) -> None:
    remove_traces(folder, WORK)
    for left in folder.glob("*.partial.json*"):  # by one that was killed as it wrote of its inputs
        left.unlink(missing_ok=True)


def _clear(folder: Path) -> None:
    for split in SPLITS:
        shutil.rmtree(folder / split, ignore_errors=True)


def _finish(job: Job, parts: int, catalog: Catalog, plan: dict[str, Any], governance: Governance) -> Manifest:
    """Merge what the parts gave: indexes, samples from left-over tokens, what was read, manifest."""
    splits = {name: split for name in SPLITS if (split := _merge_split(job, parts, name)) is not None}
    if not splits or ("train" not in splits and job.val_fraction < 1):
        _clear(job.out)
        shutil.rmtree(job.work)
        few = f"fewer than seq_len = {job.seq_len} tokens" if job.chat is None else "no whole conversation"
        raise ValueError(f"{job.out}: the sources hold {few}{' to train on' if job.val_fraction < 1 else ''}")
    marks = (read_mark(job.mark(index)) for index in range(parts))
    problems = merge_problems((mark["problems"] for mark in marks if mark is not None), catalog.duplicates)
    paths = [path for path, _ in catalog.files]
    manifest = Manifest(
        **plan,
        splits=splits,
        problems=problems,
        governance=governance,
        inputs=keep_inputs(job.out, paths),
        curation=keep_curations(job.out, [source.given for source in catalog.sources], paths),
    )
    write_manifest(job.out, manifest)
    return manifest


def _merge_split(job: Job, parts: int, name: str) -> Split | None:
    """Write the split's index; None if it has not a single sample."""
    folder = job.out / name
    shutil.rmtree(folder / REST, ignore_errors=True)
    packer = job.packer(folder / REST)
    shards: list[dict[str, Any]] = []
    counts = {"documents": 0, "tokens": 0, "text_bytes": 0}
    lengths: list[int] = []
    for index in range(parts):
        mark = read_mark(job.mark(index))
        assert mark is not None
        split = mark["splits"][name]
        shards += split["shards"]
        packer.take(split["rest"])
        counts = {key: count + split[key] for key, count in counts.items()}
        lengths = [
            a + b for a, b in zip(lengths or [0] * len(split["lengths"]), split["lengths"], strict=True)
        ]
    dropped = packer.finish()
    for shard in packer.shards:
        for form in ("raw_data", "zip_data"):
            shard[form]["basename"] = f"{REST}/{shard[form]['basename']}"
    shards += packer.shards
    samples = sum(shard["samples"] for shard in shards)
    if not samples:
        return None
    digest = write_index(folder, shards)
    while lengths and not lengths[-1]:
        lengths.pop()
    return Split(samples=samples, dropped_tokens=dropped, lengths=lengths, index=digest, **counts)
