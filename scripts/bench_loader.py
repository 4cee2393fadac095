"""Loader throughput beside a plain mosaicml-streaming ``StreamingDataset`` with fixed proportions (on Linux).

    python scripts/bench_loader.py [--samples N] [--seq-len 2048] [--workers 0 1 2] [--rounds 3] [--json FILE]

Two sources are written to a temporary folder as ``dbrx-train data prepare`` writes them, in zstd-packed MDS
shards, with as many samples as a run reads. The contestants read them with the same proportions, shuffle,
batch size, workers and prefetch factor. Ours is ``ScheduledDataset`` and ``build_loader``; plain is
``StreamingDataset`` in a ``DataLoader``, whose collate function widens the tokens to int64 (ours does that on
reading) and then is ours. Each run is a process of its own with one thread for tensor operations. The
contestants take turns, who begins alternates, and the first round is thrown away. Shards are ``packed``
(unpacked when first needed, from a fresh copy for each run) or ``unpacked`` (by the first round); the page
cache holds them either way.

- samples/s: after the first batch.
- first batch: seconds from constructing the dataset to the first batch in hand; imports are excluded.
- peak MiB: resident in the process and its workers, each at its highest, shared pages counted once.
- above imports: the same, less what the process held before the dataset was made.

Each run also checks what was served: samples of each source, how many differ, and how far the first source's
count ever was from its share of the samples so far. Ratios are taken within a round.
"""

from __future__ import annotations

import argparse
import itertools
import json
import os
import re
import shutil
import statistics
import subprocess
import sys
import time
from collections.abc import Iterable, Iterator, Sequence
from contextlib import suppress
from importlib.metadata import version
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import numpy as np
import torch
from streaming import Stream, StreamingDataset
from torch.utils.data import DataLoader

from dbrx_train import Clock, MixSchedule
from dbrx_train.data.mds import ShardWriter, write_index
from dbrx_train.data.stream.dataset import ScheduledDataset
from dbrx_train.data.stream.loader import build_loader, collate
from dbrx_train.data.stream.shards import Source

SHARES = {"web": 0.75, "code": 0.25}
BATCH, WORDS, EOS = 32, 100352, 100257
FIGURES = {"samples/s": ",.0f", "first batch": ".2f", "peak MiB": ",.0f", "above imports": ",.0f"}
CONTESTANTS = ("ours", "plain")
Result = dict[str, Any]


def make_corpus(folder: Path, samples: int, seq_len: int) -> None:
    """Every sample begins with its source and its number there; the rest is skewed about as words are."""
    rng = np.random.default_rng(0)
    for source, (name, share) in enumerate(SHARES.items()):
        writer = ShardWriter(folder / name / "train", seq_len)
        for number in range(int(share * samples)):
            tokens = (rng.random(seq_len, np.float32) ** 6 * WORDS).astype(np.uint32)
            tokens[:2] = source, number
            writer.write(tokens)
        writer.close()
        write_index(writer.folder, writer.shards)


def our_loader(corpus: str, samples: int, seq_len: int, workers: int) -> Iterable[Any]:
    clock = Clock.of(f"{samples}sp", seq_len=seq_len, global_batch_size=BATCH)
    mix = MixSchedule.from_config([{"at": "0tok", "weights": SHARES}], clock)
    sources = {name: Source(f"{corpus}/{name}") for name in SHARES}
    return build_loader(ScheduledDataset(sources, mix, clock), eos_id=EOS, pad_id=EOS, num_workers=workers)


def plain_loader(corpus: str, _samples: int, _seq_len: int, workers: int) -> Iterable[Any]:
    streams = [Stream(local=f"{corpus}/{name}", split="train", proportion=p) for name, p in SHARES.items()]
    shuffle = {"shuffle": True, "shuffle_seed": 0, "num_canonical_nodes": 1}
    dataset = StreamingDataset(streams=streams, batch_size=BATCH, **shuffle)
    ahead = 4 if workers else None
    return DataLoader(dataset, BATCH, num_workers=workers, collate_fn=collate_plain, prefetch_factor=ahead)


def collate_plain(samples: Sequence[dict[str, Any]]) -> dict[str, torch.Tensor]:
    wide = [np.array(sample["tokens"], np.int64) for sample in samples]
    return collate(
        [{"tokens": t, "source": int(t[0]), "sample_id": int(t[1])} for t in wide], eos_id=EOS, pad_id=EOS
    )


def held() -> float:
    """MiB at the peak: one process' resident set; of its workers, what they do not share with it is added."""
    children = Path(f"/proc/self/task/{os.getpid()}/children").read_text().split()
    kib = _memory("self")["RssFile"]
    for process in ("self", *children):
        with suppress(OSError):  # a worker that has ended
            at = _memory(process)
            kib += at["Pss_Anon"] + at["Pss_Shmem"] + at["VmHWM"] - at["VmRSS"]
    return kib / 1024


def _memory(process: str) -> dict[str, int]:
    text = Path(f"/proc/{process}/status").read_text() + Path(f"/proc/{process}/smaps_rollup").read_text()
    return {name: int(kib) for name, kib in re.findall(r"^(\w+):\s+(\d+) kB$", text, re.M)}


def measure(name: str, corpus: str, samples: int, seq_len: int, workers: int) -> None:
    """Read all samples, in a process that has done nothing else, and print what came of it."""
    Path("/proc/self/clear_refs").write_text("5")  # the peak of the imports does not count
    heads = np.zeros((samples, 2), np.int64)
    imports, first, done = held(), 0.0, 0
    start = time.perf_counter()
    make = {"ours": our_loader, "plain": plain_loader}[name]
    batches = iter(make(corpus, samples, seq_len, workers))  # keeps the workers until their memory is read
    for batch in itertools.islice(batches, samples // BATCH):
        first = first or time.perf_counter()
        heads[done : done + BATCH] = batch["input_ids"][:, :2].numpy()
        done += BATCH
    end, peak = time.perf_counter(), held()
    source, distinct = heads[:done, 0], len(np.unique(heads[:done], axis=0))
    ahead = np.cumsum(source == 0) - SHARES["web"] * np.arange(1, done + 1)
    served = {"served": np.bincount(source).tolist(), "distinct": distinct, "off": np.abs(ahead).max()}
    figures = ((done - BATCH) / (end - first), first - start, peak, peak - imports)
    print(json.dumps(dict(zip(FIGURES, figures, strict=True)) | served))


def all_runs(samples: int, seq_len: int, workers: Sequence[int], rounds: int) -> Iterator[Result]:
    """The runs of every round that counts, each a ``measure`` with temporary files of its own."""
    with TemporaryDirectory(prefix="bench-loader-") as folder:
        origin, packed, unpacked = (Path(folder, name) for name in ("origin", "packed", "unpacked"))
        make_corpus(origin, samples, seq_len)
        shutil.copytree(origin, unpacked)
        plan = itertools.product(range(rounds + 1), (packed, unpacked), workers, (0, 1))
        for number, corpus, count, turn in plan:
            name = CONTESTANTS[(turn + number) % 2]
            if corpus is packed:
                shutil.copytree(origin, packed)
            env = os.environ | {"TMPDIR": folder, "OMP_NUM_THREADS": "1"}
            case = json.dumps([name, str(corpus), samples, seq_len, count])
            command = [sys.executable, __file__, "--measure", case]
            printed = subprocess.run(command, stdout=subprocess.PIPE, text=True, env=env, check=True).stdout
            shutil.rmtree(packed, ignore_errors=True)
            about = {"round": number, "shards": corpus.name, "workers": count, "contestant": name}
            result = about | json.loads(printed) | {"load": os.getloadavg()[0]}
            print(json.dumps(result), file=sys.stderr)
            if number:
                yield result


def summary(runs: Sequence[Result]) -> Iterator[Result]:
    """For each case and figure the median, least and greatest of both contestants and of the ratios."""
    for shards, workers in dict.fromkeys((run["shards"], run["workers"]) for run in runs):
        case = [run for run in runs if (run["shards"], run["workers"]) == (shards, workers)]
        for figure in FIGURES:
            values = {of: [run[figure] for run in case if run["contestant"] == of] for of in CONTESTANTS}
            values["ours/plain"] = [a / b for a, b in zip(values["ours"], values["plain"], strict=True)]
            spread = {name: [statistics.median(v), min(v), max(v)] for name, v in values.items()}
            yield {"shards": shards, "workers": workers, "figure": figure} | spread


def show(rows: Sequence[Result], runs: Sequence[Result]) -> None:
    """Print the table and the check."""
    print("| shards | workers | figure | ours | plain | ours/plain |\n|---|---|---|---|---|---|")
    for row in rows:
        cells = [str(row[name]) for name in ("shards", "workers", "figure")]
        for name in (*CONTESTANTS, "ours/plain"):
            form = FIGURES[row["figure"]] if name in CONTESTANTS else ".2f"
            cells.append("{} ({} to {})".format(*(format(value, form) for value in row[name])))
        print("|", " | ".join(cells), "|")
    for name in CONTESTANTS:
        mine = [run for run in runs if run["contestant"] == name]
        counts = sorted({(*run["served"], run["distinct"]) for run in mine})
        print(f"{name}: {counts} samples of web, of code, distinct; off by {max(run['off'] for run in mine)}")


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--samples", type=int, default=32768, help=f"per run, in batches of {BATCH}")
    parser.add_argument("--seq-len", type=int, default=2048)
    parser.add_argument("--workers", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--json", type=Path, help="write the figures of every run there")
    parser.add_argument("--measure", type=json.loads, help=argparse.SUPPRESS)
    asked = parser.parse_args()
    if asked.measure:
        measure(*asked.measure)
        return
    runs = list(all_runs(asked.samples, asked.seq_len, asked.workers, asked.rounds))
    rows = list(summary(runs))
    show(rows, runs)
    if asked.json:
        setup = {"samples": asked.samples, "seq_len": asked.seq_len, "batch": BATCH, "cpus": os.cpu_count()}
        setup |= {name: version(name) for name in ("torch", "mosaicml-streaming")}
        asked.json.write_text(json.dumps({"setup": setup, "summary": rows, "runs": runs}, indent=1))


if __name__ == "__main__":
    main()
