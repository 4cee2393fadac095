"""`data prepare` beside what else makes tokens of text, in tokens per second of one core.

    python scripts/bench_prepare.py [--megabytes 12] [--rounds 3] [--json FILE]

The text is the source code of Python's library, a document a file. Contestants take turns, each a process of
its own on one core; what is timed begins after imports and with the vocabulary read. `floor` is tiktoken's
`encode_ordinary_batch` in one thread, which writes nothing. `ours` is `data prepare` with one worker process,
shards, manifest and hashes included. `foundry` is LLM Foundry's ConcatTokensDataset with the same vocabulary
as a fast tokenizer of transformers, written by Streaming's MDSWriter (absent without the two packages).
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from foundry import foundry_module
from turns import in_turn, spread

SEQ_LEN = 2048


def gather_text(folder: Path, megabytes: float) -> None:
    total = 0
    for number, file in enumerate(sorted(Path(os.__file__).parent.rglob("*.py"))):
        if total > megabytes * 1e6:
            return
        text = file.read_bytes().decode("utf-8", errors="ignore").encode()
        (folder / f"{number:05d}.py").write_bytes(text)
        total += len(text)


def floor(texts: Path, _out: Path) -> Callable[[], int]:
    from dbrx_train.data.tokenizer import load_tokenizer

    tokenizer = load_tokenizer()
    tokenizer.encode("warm")
    documents = [file.read_text("utf-8") for file in sorted(texts.iterdir())]
    return lambda: sum(map(len, tokenizer.encode_batch(documents, num_threads=1)))


def ours(texts: Path, out: Path) -> Callable[[], int]:
    from dbrx_train.data.manifest import read_manifest
    from dbrx_train.data.prepare.pipeline import prepare

    def work() -> int:
        prepare([str(texts)], str(out), seq_len=SEQ_LEN, suffixes=[".py"], val_fraction=0.0, processes=1)
        return SEQ_LEN * read_manifest(str(out)).splits["train"].samples

    return work


def foundry(texts: Path, out: Path) -> Callable[[], int]:
    module = foundry_module("data", "data.py")
    from streaming import MDSWriter
    from transformers import AutoTokenizer

    from dbrx_train.data.tokenizer import load_tokenizer
    from dbrx_train.data.tokenizer_json import write_tokenizer

    vocabulary = out.with_name("vocabulary")
    vocabulary.mkdir()
    write_tokenizer(vocabulary, load_tokenizer(), SEQ_LEN)
    tokenizer = AutoTokenizer.from_pretrained(str(vocabulary))
    documents = [{"text": file.read_text("utf-8")} for file in sorted(texts.iterdir())]

    def work() -> int:
        samples = module.ConcatTokensDataset(documents, tokenizer, SEQ_LEN, "", "<|endoftext|>", False)
        count = 0
        with MDSWriter(columns={"tokens": "ndarray:int32"}, out=str(out), compression=None) as writer:
            for sample in samples:
                writer.write(sample)
                count += SEQ_LEN
        return count

    return work


CONTESTANTS: dict[str, Callable[[Path, Path], Callable[[], int]]] = {
    "floor": floor,
    "ours": ours,
    "foundry": foundry,
}


def measure(name: str, texts: Path) -> None:
    with tempfile.TemporaryDirectory() as folder:
        try:
            work = CONTESTANTS[name](texts, Path(folder, "out"))
        except ImportError as error:
            print(json.dumps({"absent": str(error)}))
            return
        begin = time.perf_counter()
        tokens = work()
        print(json.dumps({"tokens": tokens, "rate": tokens / (time.perf_counter() - begin)}))


def main() -> None:
    raw = argparse.RawDescriptionHelpFormatter
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=raw)
    parser.add_argument("--megabytes", type=float, default=12)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--json", type=Path)
    parser.add_argument("--measure", nargs=2, help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.measure:
        measure(args.measure[0], Path(args.measure[1]))
        return
    core = str(min(os.sched_getaffinity(0)))
    pin = ["taskset", "-c", core] if shutil.which("taskset") else []
    results: dict[str, list[dict[str, Any]]] = {name: [] for name in CONTESTANTS}
    with tempfile.TemporaryDirectory() as folder:
        gather_text(Path(folder), args.megabytes)
        for name in in_turn(list(CONTESTANTS), args.rounds):
            command = [*pin, sys.executable, __file__, "--measure", name, folder]
            printed = subprocess.run(command, stdout=subprocess.PIPE, text=True, check=True).stdout
            results[name].append(json.loads(printed.splitlines()[-1]))
    for name, runs in results.items():
        if "absent" in runs[0]:
            print(f"{name}: absent ({runs[0]['absent']})")
            continue
        rates = [run["rate"] for run in runs]
        to_floor = [run["rate"] / least["rate"] for run, least in zip(runs, results["floor"], strict=True)]
        print(
            f"{name}: {spread(rates, ',.0f', ' tokens/s')}, {spread(to_floor, '.2f')} of the floor, "
            f"{runs[0]['tokens']:,} tokens"
        )
    if args.json:
        args.json.write_text(json.dumps(results, indent=1))


if __name__ == "__main__":
    main()
