"""Sources whose samples are numbers, and what a dataset serves of them."""

from __future__ import annotations

import itertools
from pathlib import Path
from typing import Any

import numpy as np
from streaming import MDSWriter

from dbrx_train.data.mix.schedule import MixPoint, MixSchedule
from dbrx_train.data.stream.dataset import ScheduledDataset
from dbrx_train.data.stream.loader import build_loader
from dbrx_train.data.stream.shards import Source
from dbrx_train.schedule import Clock

SEQ_LEN = 8
POINTS = [
    MixPoint(0, {"a": 3, "b": 1}),
    MixPoint(20, {"a": 1, "b": 3}, "linear"),
    MixPoint(40, {"b": 1, "c": 1}),
]


def write_source(folder: Path, samples: range, compression: str | None = "zstd") -> None:
    """Shards of about ten samples; a sample's tokens all are its number within the source."""
    writer = MDSWriter(
        out=str(folder),
        columns={"tokens": "ndarray:uint32"},
        compression=compression,
        hashes=["sha1"],
        size_limit=10 * (SEQ_LEN * 4 + 20),
    )
    with writer as out:
        for number in samples:
            out.write({"tokens": np.full(SEQ_LEN, number, np.uint32)})


def dataset(root: Path, *, nodes: int = 2, batch: int = 8, **options: Any) -> ScheduledDataset:
    sources = {path.name: Source(str(path)) for path in sorted(root.iterdir())}
    schedule = options.pop("schedule", None) or MixSchedule(
        POINTS, sources=list(sources), canonical_nodes=nodes
    )
    clock = options.pop("clock", None) or equal_steps(batch)
    return ScheduledDataset(sources, schedule, clock, **options)


def equal_steps(global_batch_size: int = 8) -> Clock:
    return Clock.of("1000ba", seq_len=SEQ_LEN, global_batch_size=global_batch_size)


def steps(data: ScheduledDataset, count: int, workers: int = 0) -> list[list[tuple[int, int]]]:
    """(source, sample) of each sample of this rank's next batches, checked against the tokens themselves."""
    result = []
    for batch in itertools.islice(build_loader(data, eos_id=0, pad_id=0, num_workers=workers), count):
        assert (batch["input_ids"] == batch["input_ids"][:, :1]).all()
        result.append(list(zip(batch["source"].tolist(), batch["input_ids"][:, 0].tolist(), strict=True)))
    return result


def all_ranks(
    root: Path, ranks: int, count: int, state: dict[str, Any] | None = None, **options: Any
) -> list[Any]:
    """The global batches of the next steps, put together from every rank's."""
    workers, parts = options.pop("workers", 0), []
    for rank in range(ranks):
        data = dataset(root, rank=rank, world_size=ranks, **options)
        if state is not None:
            data.load_state_dict(state)
        parts.append(steps(data, count, workers))
    return [list(itertools.chain(*batches)) for batches in zip(*parts, strict=True)]
