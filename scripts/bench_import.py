"""Reading a Hugging Face checkpoint into a sharded model, beside a plain read of its files (on Linux).

    python scripts/bench_import.py [--layers 3] [--ranks 1 2 4] [--rounds 3] [--folder DIR] [--json FILE]

A random DBRX in bfloat16 is written to a temporary folder (3 layers: 2.5 GB), as safetensors of at most
500 MB. On each number of gloo ranks, a run's model is made as `dbrx-train train` makes it, float32 and fully
sharded, and filled as `init_from` fills it; "plain" is one process that reads the files from end to end into
a buffer. The contestants take turns, and each reads once from the disk (its pages of the files are dropped
first, with posix_fadvise) and once from the page cache.

- seconds: from when all ranks are ready until all have read.
- asked, fetched: bytes of the files that a rank asked for, and that were read from the disk for it.
- shard: each rank's part of the model, which is there before.
- extra: the rank's own memory (anonymous and shared pages) at its peak while it reads, less that before.
- mapped: pages of the files at their peak, which the system takes back when it needs them.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import torch

from dbrx_train.model.config import DbrxConfig
from dbrx_train.model.hf.files import Stored, outline, write, write_json
from dbrx_train.model.hf.names import table

BLOCK, MIB = 2**24, 2**20


def make_checkpoint(folder: Path, layers: int) -> None:
    from dbrx_train.checkpoint.weights import meta_model

    config = DbrxConfig(
        d_model=2048, n_layers=layers, n_heads=16, ffn_hidden_size=3584, vocab_size=32_768, max_seq_len=2048
    )
    state = dict(meta_model(config).named_parameters())
    parts = table(config, {name: tuple(tensor.shape) for name, tensor in state.items()})
    generator = torch.Generator().manual_seed(0)

    def whole(name: str) -> torch.Tensor:
        rows = torch.empty(state[name].shape, dtype=torch.bfloat16)
        for begin in range(0, len(rows), 4096):
            rows[begin : begin + 4096].normal_(std=0.02, generator=generator)
        return rows

    write_json(folder / "config.json", config.to_hf())
    write(folder, parts, outline(parts, state, dict.fromkeys(state, torch.bfloat16)), whole, 500 * 10**6)


def drop_from_cache(folder: Path) -> None:
    for path in folder.glob("*.safetensors"):
        with path.open("rb") as file:
            os.fsync(file.fileno())
            os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)


def fetched() -> int:
    """Bytes that this process has had read from the disk."""
    return int(
        dict(line.split(": ") for line in Path("/proc/self/io").read_text().splitlines())["read_bytes"]
    )


def resident() -> tuple[int, int]:
    """Bytes of this process's own memory, and of files."""
    lines = dict(line.split(":", 1) for line in Path("/proc/self/status").read_text().splitlines())
    own, shared, file = (int(lines[key].split()[0]) * 1024 for key in ("RssAnon", "RssShmem", "RssFile"))
    return own + shared, file


@contextmanager
def watching() -> Iterator[list[int]]:
    """The peaks of ``resident``, looked at every 2 ms."""
    peaks, stop = [0, 0], threading.Event()

    def watch() -> None:
        while not stop.wait(0.002):
            peaks[:] = map(max, peaks, resident())

    thread = threading.Thread(target=watch)
    thread.start()
    try:
        yield peaks
    finally:
        stop.set()
        thread.join()


def plain(folder: Path) -> dict[str, Any]:
    buffer, begin, before, size = bytearray(BLOCK), time.monotonic(), fetched(), 0
    for path in sorted(folder.glob("*.safetensors")):
        with path.open("rb", buffering=0) as file:
            while count := file.readinto(buffer):
                size += count
    return {"seconds": time.monotonic() - begin, "asked": size, "fetched": fetched() - before}


def one_rank(folder: Path) -> None:
    """A rank of ``imported``; rank 0 prints what all found."""
    import torch.distributed as dist

    from dbrx_train.checkpoint.weights import meta_model, open_weights, read_together
    from dbrx_train.parallel import MeshShape, parallelize

    asked, check = [0], Stored._check_finite

    def counted(self: Stored, part: Any, values: torch.Tensor) -> None:
        asked[0] += values.nbytes
        check(self, part, values)

    Stored._check_finite = counted  # type: ignore[method-assign]
    dist.init_process_group("gloo")
    weights = open_weights(folder, print)
    model = meta_model(weights.model)
    parallelize(model, MeshShape.of(dist.get_world_size()), device_type="cpu", seed=0)
    shard = sum(parameter.to_local().nbytes for parameter in model.parameters())
    dist.barrier()
    if dist.get_rank() == 0 and os.environ["BENCH_CACHE"] == "cold":
        drop_from_cache(folder)
    dist.barrier()
    before, disk, begin = resident(), fetched(), time.monotonic()
    with watching() as peaks:
        read_together(weights, model)
        dist.barrier()
        seconds = time.monotonic() - begin
    mine = {
        "seconds": seconds,
        "asked": asked[0],
        "fetched": fetched() - disk,
        "shard": shard,
        "extra": peaks[0] - before[0],
        "mapped": peaks[1] - before[1],
    }
    everyones = [mine] * dist.get_world_size()
    dist.all_gather_object(everyones, mine)
    if dist.get_rank() == 0:
        print(json.dumps(everyones), flush=True)
    dist.barrier()
    os._exit(0)  # gloo's own farewell hangs now and then


def imported(folder: Path, ranks: int, cache: str) -> list[dict[str, Any]]:
    launch = [sys.executable, "-m", "torch.distributed.run", f"--nproc-per-node={ranks}", "--standalone"]
    done = subprocess.run(
        [*launch, __file__, "--one-rank", str(folder)],
        env={**os.environ, "OMP_NUM_THREADS": "1", "BENCH_CACHE": cache},
        stdout=subprocess.PIPE,
        text=True,
        check=True,
    )
    found: list[dict[str, Any]] = json.loads(done.stdout.splitlines()[-1])
    return found


def measure(folder: Path, all_ranks: list[int], rounds: int) -> list[dict[str, Any]]:
    results = []
    for turn in range(rounds):
        for cache in ("cold", "warm"):
            if cache == "cold":
                drop_from_cache(folder)
            results.append({"who": "plain", "cache": cache, "round": turn, "ranks": [plain(folder)]})
            for ranks in all_ranks:
                result = {"who": f"{ranks} ranks", "cache": cache, "round": turn}
                results.append(result | {"ranks": imported(folder, ranks, cache)})
                print(json.dumps(results[-1]), file=sys.stderr, flush=True)
    return results


def report(results: list[dict[str, Any]]) -> str:
    """Medians over rounds, with the least and the greatest; of ranks, the one that needs most."""
    lines = ["| cache | who | seconds | asked MiB | fetched MiB | shard MiB | extra MiB | mapped MiB |"]
    lines.append("|---|---|---|---|---|---|---|---|")
    for cache, who in dict.fromkeys((r["cache"], r["who"]) for r in results):
        rounds = [r["ranks"] for r in results if (r["cache"], r["who"]) == (cache, who)]
        seconds = [ranks[0]["seconds"] for ranks in rounds]
        cells = [f"{statistics.median(seconds):.2f} ({min(seconds):.2f} to {max(seconds):.2f})"]
        for key in ("asked", "fetched", "shard", "extra", "mapped"):
            most = [max(rank[key] for rank in ranks) / MIB for ranks in rounds if key in ranks[0]]
            cells.append(f"{statistics.median(most):,.0f}" if most else "")
        lines.append(f"| {cache} | {who} | {' | '.join(cells)} |")
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("--layers", type=int, default=3)
    parser.add_argument("--ranks", type=int, nargs="+", default=[1, 2, 4])
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--folder", help="where to make the temporary folder")
    parser.add_argument("--json", type=Path, help="write every figure there")
    parser.add_argument("--one-rank", type=Path, help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.one_rank:
        one_rank(options.one_rank)
    with TemporaryDirectory(dir=options.folder) as name:
        make_checkpoint(Path(name), options.layers)
        size = sum(path.stat().st_size for path in Path(name).glob("*.safetensors"))
        results = measure(Path(name), options.ranks, options.rounds)
    if options.json:
        options.json.write_text(json.dumps(results, indent=1), encoding="utf-8")
    print(f"{size / MIB:,.0f} MiB of bfloat16; load {os.getloadavg()[0]:.1f}; torch {torch.__version__}")
    print(report(results))


if __name__ == "__main__":
    main()
