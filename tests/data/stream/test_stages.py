"""Steps that change in size and length during a run: the same samples, in the same order, on any world."""

from __future__ import annotations

import itertools
import json
import re
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from numbered_data import SEQ_LEN, all_ranks, dataset, equal_steps
from streaming import MDSWriter

from dbrx_train.data.mix.schedule import MixPoint, MixSchedule
from dbrx_train.data.stream.dataset import ScheduledDataset
from dbrx_train.data.stream.loader import build_loader
from dbrx_train.data.stream.shards import Source
from dbrx_train.schedule import Clock

Sample = tuple[int, int]

# 600 tokens are 75 samples; the first step at or after them begins at sample 5 * 4 + 7 * 8 = 76.
GROWING = equal_steps(4).with_batch_size("5ba", 8).with_batch_size("600tok", 16)
SIZES = [4] * 5 + [8] * 7 + [16] * 4


def by_node(batches: list[list[Sample]]) -> list[list[Sample]]:
    """What each of two canonical nodes served, in order."""
    halves = [[batch[: len(batch) // 2], batch[len(batch) // 2 :]] for batch in batches]
    return [list(itertools.chain(*parts)) for parts in zip(*halves, strict=True)]


@pytest.mark.parametrize("ranks", [1, 2, 4])
def test_a_growing_global_batch_serves_the_same_order_and_resumes(corpora: Path, ranks: int) -> None:
    equal = by_node(all_ranks(corpora, 1, sum(SIZES) // 4, batch=4))
    whole = all_ranks(corpora, ranks, len(SIZES), clock=GROWING)
    assert [len(batch) for batch in whole] == SIZES
    assert by_node(whole) == equal
    for step in (2, 5, 9, 12, 14):
        state = json.loads(json.dumps(dataset(corpora, clock=GROWING).state_dict(sum(SIZES[:step]), True)))
        assert all_ranks(corpora, ranks, 16 - step, state, clock=GROWING) == whole[step:]
    assert all_ranks(corpora, ranks, 2, state, clock=GROWING, workers=2) == whole[step:]


def test_only_the_future_of_the_batch_size_may_change(corpora: Path) -> None:
    state = dataset(corpora, clock=GROWING).state_dict(sum(SIZES[:9]), True)
    whole = all_ranks(corpora, 1, 9, clock=GROWING)
    never = equal_steps(4).with_batch_size("5ba", 8)
    following = all_ranks(corpora, 2, 10, state, clock=never)
    assert {len(batch) for batch in following} == {8}
    equal = by_node(all_ranks(corpora, 1, (52 + 80) // 4, batch=4))
    assert by_node(whole + following) == equal
    kept = "[{until: 160tok, global_batch_size: 4}, {until: 416tok, global_batch_size: 8}]"
    for other, begin, was, now in (
        (equal_steps(8), 0, 32, 64),
        (equal_steps(4), 160, 64, 32),
        (equal_steps(4).with_batch_size("3ba", 8), 96, 32, 64),
    ):
        says = f"after {begin} tokens a step had {was}, and now has {now}; what was is kept with"
        with pytest.raises(ValueError, match=re.escape(f"{says} batch_size_warmup: {kept}")):
            dataset(corpora, clock=other).load_state_dict(state)
    as_told = equal_steps(4).with_batch_size("160tok", 8).with_batch_size("416tok", 32)
    assert {len(batch) for batch in all_ranks(corpora, 1, 3, state, clock=as_told)} == {32}


def test_a_position_amid_a_step_is_refused(corpora: Path) -> None:
    with pytest.raises(ValueError, match="num_samples: 22 end amid a step; count those of all ranks"):
        dataset(corpora, clock=GROWING).state_dict(22, True)


LONG = 4 * SEQ_LEN
POINTS_THEN_LONG: list[dict[str, Any]] = [
    {"at": "0tok", "weights": {"a": 3, "b": 1}},
    {"at": "300tok", "weights": {"a": 1, "b": 3}, "interpolation": "linear"},
    {"at": "0.75dur", "weights": {"long": 1, "longer": 1}, "seq_len": LONG},
]


@pytest.fixture(scope="module")
def with_long(corpora: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The corpora, and two sources of longer samples."""
    root = tmp_path_factory.mktemp("long")
    for name in "ab":
        (root / name).symlink_to(corpora / name)
    for name in ("long", "longer"):
        with MDSWriter(out=str(root / name / "train"), columns={"tokens": "ndarray:uint32"}) as out:
            for number in range(30):
                out.write({"tokens": np.full(LONG, number, np.uint32)})
    return root


def long_run(root: Path, rank: int = 0, ranks: int = 1) -> ScheduledDataset:
    clock = Clock.of("20ba", seq_len=SEQ_LEN, global_batch_size=4).with_batch_size("4ba", 8)
    clock = clock.with_seq_len("0.75dur", LONG)
    names = ("a", "b", "long", "longer")
    mix = MixSchedule.from_config(POINTS_THEN_LONG, clock, sources=names, canonical_nodes=2)
    sources = {name: Source(str(root / name)) for name in names}
    return ScheduledDataset(sources, mix, clock, rank=rank, world_size=ranks)


def shapes_and_samples(data: ScheduledDataset, count: int, workers: int = 0) -> list[Any]:
    loader = build_loader(data, eos_id=0, pad_id=0, num_workers=workers, endless=True)
    batches = itertools.islice(loader, count)
    return [(tuple(b["input_ids"].shape), b["source"].tolist(), b["sample_id"].tolist()) for b in batches]


def test_longer_samples_from_a_point_on_keep_the_tokens_of_a_step(with_long: Path) -> None:
    whole = shapes_and_samples(long_run(with_long), 24)
    # 4 x 32 + 16 x 64 tokens, of which 0.75 are over amid step 16: longer samples from step 16 on
    assert [shape for shape, *_ in whole] == [(4, 8)] * 4 + [(8, 8)] * 12 + [(2, 32)] * 8
    for shape, sources, _ in whole:
        assert set(sources) <= ({2, 3} if shape[1] == LONG else {0, 1})
    assert sum(sources.count(2) for _, sources, _ in whole[16:]) == 8
    for step in (4, 10, 15, 16, 17, 20):
        samples = sum(len(sources) for _, sources, _ in whole[:step])
        state = json.loads(json.dumps(long_run(with_long).state_dict(samples, True)))
        for ranks, workers in ((1, 0), (2, 0), (2, 2)):
            parts = []
            for rank in range(ranks):
                data = long_run(with_long, rank, ranks)
                data.load_state_dict(state)
                parts.append(shapes_and_samples(data, 24 - step, workers))
            joined = [
                tuple(list(itertools.chain.from_iterable(part[i] for part in batch)) for i in (1, 2))
                for batch in zip(*parts, strict=True)
            ]
            assert joined == [(sources, ids) for _, sources, ids in whole[step:]]


def test_a_loader_of_ones_own_ends_with_the_clock(with_long: Path) -> None:
    data = long_run(with_long)
    assert [len(batch["input_ids"]) for batch in build_loader(data, eos_id=0, pad_id=0)] == (
        [4] * 4 + [8] * 12 + [2] * 4
    )
    data.load_state_dict(long_run(with_long).state_dict(4 * 4 + 12 * 8 + 2 * 2, True))
    assert data.batches_left == 2
    for workers in (0, 2):
        assert len(list(build_loader(data, eos_id=0, pad_id=0, num_workers=workers))) == 2


def test_what_does_not_fit_a_length_is_refused(with_long: Path) -> None:
    clock = equal_steps(8).with_seq_len("10ba", LONG)
    with pytest.raises(ValueError, match="seq_len: a step of 8 samples of 8 tokens does not split into"):
        equal_steps(8).with_seq_len("10ba", 48)
    point = {"at": "10ba", "weights": {"a": 1}, "seq_len": LONG}
    start = {"at": "0tok", "weights": {"a": 1}}
    mix = MixSchedule.from_config([start, point], clock)
    with pytest.raises(ValueError, match=r"^mix: a has weight where samples have 8 tokens and where .* 32"):
        mix.sample_lengths(clock)
    with pytest.raises(
        ValueError, match=r"^mix\[1\].interpolation: no ramp leads to samples of another length"
    ):
        MixSchedule.from_config([start, {**point, "weights": {"long": 1}, "interpolation": "linear"}], clock)
    with pytest.raises(ValueError, match=r"^mix\[1\].seq_len: is 32, but the clock has 8 there"):
        MixSchedule.from_config([start, point], equal_steps(8))
    for points in ([MixPoint(0, {"a": 1})], [MixPoint(0, {"a": 1}), MixPoint(80, {"long": 1}, "linear")]):
        with pytest.raises(ValueError, match=r"^mix: samples have 32 tokens after 640, but no point"):
            MixSchedule(points).sample_lengths(clock)
    moved = long_run(with_long).state_dict(4 * 4 + 12 * 8 + 2 * 2, True)
    moved["steps"][-1][0] += 64
    with pytest.raises(
        ValueError, match=r"^mix: the past .* after 896 tokens samples had 8, and now have 32"
    ):
        long_run(with_long).load_state_dict(moved)
    mix, sources = (
        MixSchedule([MixPoint(0, {"a": 1}), MixPoint(80, {"b": 1})]),
        dict.fromkeys("ab", Source(str(with_long / "a"))),
    )
    with pytest.raises(ValueError, match="global_batch_size: 2 is no multiple of the 4 ranks"):
        ScheduledDataset(sources, mix, clock, rank=0, world_size=4)
