"""Lineage of weights: which sources they have seen, how much of each by which step, and whose they were.

A checkpoint's manifest says all of it: the position in the data, under ``made_by`` what its run's sources
are, and under ``base`` the lineage of the weights that the run began with. Sources are known again by their
shards' content, not by where they lie: so a folder that was moved, or to which shards were appended, is the
same source.
"""

from __future__ import annotations

import itertools
import os
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any

from dbrx_train.checkpoint import folder as folders
from dbrx_train.checkpoint.folder import Checkpoint
from dbrx_train.data.governance import Governance
from dbrx_train.data.inputs import Curation, InputFile, Inputs, curation_report, read_inputs
from dbrx_train.data.mds import IndexEntry, fingerprint, read_index
from dbrx_train.data.mix.schedule import MixSchedule
from dbrx_train.errors import check_exists, first_line

__all__ = [
    "KEPT",
    "Lineage",
    "SourceLineage",
    "as_json",
    "checkpoints_below",
    "describe",
    "describe_seen",
    "input_files",
    "is_prepared",
    "of_checkpoint",
    "read",
    "seen_as_json",
    "shards_of",
]

KEPT = "lineage"
"""In a run's folder: copies of its sources' lists of inputs, and of the reports of their curations."""


@dataclass(frozen=True)
class SourceLineage:
    """What a checkpoint has seen of one source."""

    name: str
    """In its run's configuration."""
    tokens: int
    """Seen by the checkpoint's step, as often as they were read; steps that were skipped count."""
    samples: int
    appends: list[int]
    """The last shard + 1 of what was there at first, and of whatever was appended."""
    fingerprints: list[str]
    """Of the shards of each."""
    folder: str = ""
    """Where it lay."""
    manifest: str | None = None
    """XXH3 of its manifest."""
    seq_len: int | None = None
    size: int | None = None
    """Samples in it."""
    governance: dict[str, Any] = field(default_factory=dict)
    inputs: dict[str, Any] | None = None
    curation: list[dict[str, Any]] = field(default_factory=list)

    def is_in(self, shards: Sequence[IndexEntry]) -> bool:
        """Whether these shards are those that were seen, or what of them there was earlier, or more."""
        parts = list(itertools.pairwise([0, *self.appends]))
        there = [(begin, end) for begin, end in parts if end <= len(shards)]
        prints = [fingerprint(shards[begin:end]) for begin, end in there]
        return bool(prints) and prints == self.fingerprints[: len(prints)]


@dataclass(frozen=True)
class Lineage:
    """Where weights come from."""

    path: str
    run: str | None = None
    """None of weights from elsewhere, whose data is not known."""
    step: int = 0
    tokens: int = 0
    """That the run had seen, of all sources."""
    sources: list[SourceLineage] = field(default_factory=list)
    mix: list[dict[str, Any]] = field(default_factory=list)
    """The points of the mix, as configured."""
    base: Lineage | None = None
    """Of the weights that the run began with."""

    @classmethod
    def from_dict(cls, values: Mapping[str, Any]) -> Lineage:
        """What ``to_dict`` gave."""
        sources = [SourceLineage(**source) for source in values.get("sources", [])]
        base = values.get("base")
        return cls(**{**values, "sources": sources, "base": base and cls.from_dict(base)})

    def to_dict(self) -> dict[str, Any]:
        """Plain values."""
        return asdict(self)

    def ancestors(self) -> Iterator[Lineage]:
        """This, the weights that its run began with, and so on."""
        found: Lineage | None = self
        while found is not None:
            yield found
            found = found.base


def of_checkpoint(checkpoint: Checkpoint) -> Lineage:
    """The lineage of a checkpoint, from its manifest alone."""
    facts, config = checkpoint.metadata, checkpoint.config
    base = facts.get("base") or {}
    path = str(checkpoint.folder.absolute())
    if "schedule" not in facts["data"]:  # imported: it is the weights that it was made of
        return Lineage.from_dict(base) if base else Lineage(path)
    data = config["data"]
    return Lineage(
        path,
        config["run_name"],
        checkpoint.step,
        checkpoint.tokens,
        [*_sources(facts)],
        data.get("mix") or [{"at": "0tok", "weights": dict.fromkeys(data["sources"], 1.0)}],
        Lineage.from_dict(base) if base else None,
    )


def _sources(facts: Mapping[str, Any]) -> Iterator[SourceLineage]:
    position, known = facts["data"], facts.get("made_by", {}).get("sources", {})
    schedule = MixSchedule.from_dict(position["schedule"])
    totals = schedule.totals(position["samples"] // schedule.canonical_nodes).tolist()
    for name, samples in zip(schedule.sources, totals, strict=True):
        about = known.get(name) or _remembered(facts["config"], name)
        shards = {key: position["sources"][name][key] for key in ("appends", "fingerprints")}
        length = about.get("seq_len") or facts["config"]["data"]["seq_len"]
        yield SourceLineage(name, samples * length, samples, **{**shards, **about})


def _remembered(config: Mapping[str, Any], name: str) -> dict[str, Any]:
    """What the configuration says of a source; older manifests say no more."""
    source = config["data"]["sources"].get(name, {})
    return {"folder": source.get("remote") or source.get("local", "")}


def is_prepared(path: Path) -> bool:
    """Whether a folder is one that ``data prepare`` made, and not an export, which has a manifest too."""
    return (path / "train" / "index.json").is_file()


def shards_of(path: Path) -> list[IndexEntry]:
    """The shards that a prepared folder has to train on; raises ValueError if its index is damaged."""
    try:
        return read_index(path / "train")
    except (OSError, KeyError, TypeError, ValueError) as error:
        raise ValueError(f"{path / 'train' / 'index.json'}: cannot be read ({first_line(error)})") from None


def read(path: Path, on_skip: Callable[[str], None]) -> Lineage:
    """The lineage of a run's newest checkpoint, a checkpoint, an export or a consolidated file.

    Raises:
        ValueError: there are no such weights.
    """
    from dbrx_train.checkpoint.registry import resolve

    path = resolve(path)
    check_exists(path)
    if path.is_dir() and not (path / "config.json").is_file():
        found = folders.open_newest(path, on_skip)
        if found is not None:
            return of_checkpoint(found)
    from dbrx_train.checkpoint.weights import open_weights

    with open_weights(path, on_skip) as weights:
        return weights.lineage or Lineage(str(path.absolute()))


def checkpoints_below(root: Path, shards: Sequence[IndexEntry]) -> Iterator[tuple[Lineage, list[Lineage]]]:
    """Every checkpoint in ``root`` that has seen a source of these shards, by run and step.

    With each come those of its ancestors, itself first if it is one, whose run read the source.
    """
    found = []
    for manifest in root.rglob(folders.MANIFEST):
        if manifest.parent.suffix == ".partial":
            continue
        try:
            found_here = Checkpoint(manifest.parent, folders.parse(manifest.parent))
            lineage = replace(of_checkpoint(found_here), path=str(manifest.parent.absolute()))
        except (ValueError, KeyError, TypeError):  # torn, or pruned meanwhile
            continue
        readers = [each for each in lineage.ancestors() if any(s.is_in(shards) for s in each.sources)]
        if readers:
            found.append((lineage, readers))
    yield from sorted(found, key=lambda pair: (pair[0].run or "", pair[0].step, pair[0].path))


def input_files(lineage: Lineage, source: SourceLineage) -> list[InputFile] | None:
    """The raw files of a source; None where neither run nor source has their list any more."""
    if source.inputs is None:
        return None
    for home in _homes(lineage, source):
        try:
            return list(read_inputs(home, Inputs(**source.inputs)))
        except ValueError:
            continue
    return None


def curation_of(lineage: Lineage, source: SourceLineage, curation: Curation) -> dict[str, Any] | None:
    """The report of a curation that a source came from, looked for in the same places."""
    for home in _homes(lineage, source):
        try:
            return curation_report(home, curation)
        except ValueError:
            continue
    return None


def _homes(lineage: Lineage, source: SourceLineage) -> Iterator[Path]:
    for parent in itertools.islice(Path(lineage.path).parents, 2):  # of a checkpoint, and of an export
        yield parent / KEPT / (source.manifest or source.name)
    yield Path(source.folder)


def describe(lineage: Lineage, most: int) -> Iterator[str]:
    """A lineage in words, at most so many input files a source."""
    for i, each in enumerate(lineage.ancestors()):
        begin = "" if i == 0 else "begun from "
        if each.run is None:
            yield f"{begin}{each.path}: weights from elsewhere; what they were trained on is not known"
            continue
        yield f"{begin}{each.path}: run {each.run}, step {each.step:,}, {each.tokens:,} tokens"
        for source in each.sources:
            yield from _describe_source(each, source, most)


def _describe_source(lineage: Lineage, source: SourceLineage, most: int) -> Iterator[str]:
    epochs = f", {source.samples / source.size:.2f} epochs" if source.size else ""
    yield f"  {source.name}: {source.tokens:,} tokens by step {lineage.step:,}{epochs}"
    digest = f", manifest {source.manifest}" if source.manifest else ""
    yield f"    {source.folder}{digest}"
    if governance := Governance(**source.governance):
        yield f"    {governance}"
    for values in source.curation:
        curation = Curation(**values)
        yield f"    curated: {curation.path}, recipe {curation.recipe}, report {curation.xxh3}"
        report = curation_of(lineage, source, curation)
        for line in _raw_inputs(report or {}, most):
            yield f"      {line}"
    files = input_files(lineage, source)
    if source.inputs is None:
        yield "    (its raw inputs are not known: it was prepared by an earlier version)"
        return
    inputs = Inputs(**source.inputs)
    yield f"    {inputs.files:,} raw file{'s' * (inputs.files != 1)}, {inputs.bytes:,} bytes"
    if files is None:
        yield "      (their list is neither with the run nor with the source any more)"
        return
    for file in files[:most]:
        yield f"      {file.path}: {file.bytes:,} bytes, xxh3 {file.xxh3}"
    if len(files) > most:
        yield f"      … and {len(files) - most:,} files more; --json lists all"


def _raw_inputs(report: Mapping[str, Any], most: int) -> Iterator[str]:
    """What a curation says that it read (`data/curate/report.py`), each path as it was given."""
    inputs = [(name, each) for name, paths in report.get("inputs", {}).items() for each in paths]
    for name, each in inputs[:most]:
        files = f"{each['files']:,} raw file{'s' * (each['files'] != 1)}, {each['bytes']:,} bytes"
        yield f"{name} from {each['given']}: {files}, digest {each['digest']}"
    if len(inputs) > most:
        yield f"… and {len(inputs) - most:,} more; --json lists all"


def as_json(lineage: Lineage) -> dict[str, Any]:
    """All of a lineage, input files and curations' reports included, as plain values."""
    values = lineage.to_dict()
    for plain, each in zip(_plain_ancestors(values), lineage.ancestors(), strict=True):
        for out, source in zip(plain["sources"], each.sources, strict=True):
            files = input_files(each, source)
            out["files"] = None if files is None else [asdict(file) for file in files]
            for known in out["curation"]:
                known["report"] = curation_of(each, source, Curation(**known))
    return values


def _plain_ancestors(values: dict[str, Any] | None) -> Iterator[dict[str, Any]]:
    while values is not None:
        yield values
        values = values["base"]


def seen_as_json(folder: Path, root: Path) -> list[dict[str, Any]]:
    """Which checkpoints in ``root`` have seen a prepared folder, how many of its tokens and by which step.

    ``through``: the ancestor in which they were seen, where that is not the checkpoint's own run.

    Raises:
        ValueError: there is no ``root``.
    """
    check_exists(root)
    shards = shards_of(folder)
    return [
        {
            "checkpoint": lineage.path,
            "run": lineage.run,
            "source": source.name,
            "tokens": source.tokens,
            "step": reader.step,
            "through": None if reader is lineage else reader.path,
        }
        for lineage, readers in checkpoints_below(root, shards)
        for reader in readers
        for source in reader.sources
        if source.is_in(shards)
    ]


def describe_seen(folder: Path, root: Path) -> Iterator[str]:
    """The same in words."""
    found = seen_as_json(folder, root)
    count = len({each["checkpoint"] for each in found})
    yield f"{folder}: seen by {count or 'no'} checkpoint{'s' * (count != 1)} in {root}"
    for each in found:
        how = f", in {os.path.relpath(each['through'])}, which it was begun from" if each["through"] else ""
        yield (
            f"  {os.path.relpath(each['checkpoint'])}: run {each['run']}, {each['tokens']:,} tokens by step "
            f"{each['step']:,}, as {each['source']}{how}"
        )
