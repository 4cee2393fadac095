"""Speed of the steps of `dbrx-train data curate`, on one core: python scripts/bench_curate.py FOLDER

Texts are the folder's .py, .md, .rst and .txt files. With --datatrove, run where datatrove is installed, its
filters of the same rules are timed on the same texts instead. A line for each: megabytes a second, and the
memory used at most so far.
"""

from __future__ import annotations

import argparse
import resource
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any


def texts_of(folder: Path, megabytes: float) -> list[str]:
    texts, size = list[str](), 0.0
    for path in sorted(folder.rglob("*")):
        if path.suffix in (".py", ".md", ".rst", ".txt") and path.is_file():
            text = path.read_text(encoding="utf-8", errors="replace")
            if text.strip() and len(text) < 1 << 24:
                texts.append(text)
                size += len(text.encode()) / 1e6
        if size >= megabytes:
            break
    return texts


def in_batches(texts: list[str]) -> Iterator[list[str]]:
    held, size = list[str](), 0
    for text in texts:
        held.append(text)
        size += len(text)
        if size >= 1 << 22:
            yield held
            held, size = [], 0
    if held:
        yield held


def ours(texts: list[str], against: str, work: Path) -> Iterator[tuple[str, Callable[[], None]]]:
    import pyarrow as pa

    from dbrx_train.data.curate.batch import Batch
    from dbrx_train.data.curate.step import Step
    from dbrx_train.data.curate.steps import STEPS

    def run(steps: list[Step]) -> None:
        for held in in_batches(texts):
            ids = pa.array([""] * len(held))
            batch = Batch(
                pa.RecordBatch.from_arrays([ids, pa.array(held, pa.large_string())], ["id", "text"])
            )
            for step in steps:
                batch = step.annotate(batch, work)

    options: dict[str, dict[str, Any]] = {"decontaminate": {"against": [against]}}
    names = [name for name in STEPS if name != "classifier" and (against or name != "decontaminate")]
    everything = [STEPS[name](**options.get(name, {})) for name in names if name != "c4"]
    for step in everything:
        step.build(work)
        yield step.name, lambda step=step: run([step])
    yield "c4", lambda: run([STEPS["c4"]()])
    yield "all but c4", lambda: run(everything)


def datatrove(texts: list[str]) -> Iterator[tuple[str, Callable[[], None]]]:
    from datatrove.data import Document
    from datatrove.pipeline.dedup.minhash import MinhashConfig, MinhashDedupSignature
    from datatrove.pipeline.filters import (
        C4QualityFilter,
        FineWebQualityFilter,
        GopherQualityFilter,
        GopherRepetitionFilter,
        LanguageFilter,
    )
    from datatrove.pipeline.formatters import PIIFormatter

    def run(function: Callable[[Any], object]) -> None:
        for number, text in enumerate(texts):
            function(Document(text=text, id=str(number), metadata={"language": "en"}))

    for name, step in (
        ("gopher_quality", GopherQualityFilter()),
        ("gopher_repetition", GopherRepetitionFilter()),
        ("c4", C4QualityFilter()),
        ("fineweb", FineWebQualityFilter()),
    ):
        yield name, lambda step=step: run(step.filter)
    formatter = PIIFormatter()
    yield "personal_data", lambda: run(lambda document: formatter.format(document.text))
    signature = MinhashDedupSignature(output_folder="/tmp/h-curate/dt", config=MinhashConfig())
    yield "near_duplicates", lambda: run(lambda d: signature.get_signature(signature.get_shingles(d.text)))
    del LanguageFilter


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("folder", type=Path)
    parser.add_argument("--megabytes", type=float, default=100)
    parser.add_argument("--against", default="", help="evaluation files, for decontaminate")
    parser.add_argument("--datatrove", action="store_true")
    parser.add_argument("--only", default="", help="steps to time, by commas")
    parser.add_argument("--work", type=Path, default=Path("/tmp"))
    args = parser.parse_args()
    texts = texts_of(args.folder, args.megabytes)
    size = sum(len(text.encode()) for text in texts) / 1e6
    print(f"{len(texts):,} texts, {size:.1f} MB")
    for name, run in datatrove(texts) if args.datatrove else ours(texts, args.against, args.work):
        if args.only and name not in args.only.split(","):
            continue
        started = time.process_time()
        run()
        seconds = time.process_time() - started
        memory = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1e3
        print(f"{name:<20} {size / seconds:8.1f} MB/s {memory:8.0f} MB", flush=True)


if __name__ == "__main__":
    main()
