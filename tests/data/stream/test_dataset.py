"""The dataset's promises: the schedule's samples at every step on any world, and none repeated early."""

from __future__ import annotations

import errno
import itertools
import os
import shutil
import tempfile
import tracemalloc
from collections import Counter
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from numbered_data import POINTS, SEQ_LEN, all_ranks, dataset, equal_steps, steps, write_source

from dbrx_train.data.mix.schedule import MixPoint, MixSchedule
from dbrx_train.data.stream.dataset import EvalDataset, ScheduledDataset
from dbrx_train.data.stream.loader import build_loader, collate, document_ids
from dbrx_train.data.stream.shards import ShardStore, Source
from dbrx_train.data.stream.shuffle import SourceOrder
from dbrx_train.schedule import Clock


def test_each_step_holds_the_schedules_samples_whatever_the_world(corpora: Path) -> None:
    whole = all_ranks(corpora, 1, 60)
    for ranks in (2, 4, 8):
        assert all_ranks(corpora, ranks, 60) == whole
    assert all_ranks(corpora, 2, 60, workers=2) == whole
    schedule = dataset(corpora).schedule
    for step, served in enumerate(itertools.accumulate(whole), 1):
        found = Counter(source for source, _ in served)
        assert [found[s] for s in range(3)] == schedule.totals(step * 4).tolist()


@pytest.mark.parametrize("shuffle", [True, False])
def test_no_sample_comes_back_before_its_part_of_the_source_is_exhausted(
    corpora: Path, shuffle: bool
) -> None:
    nodes, sizes = 2, (97, 60, 41)
    seen: dict[tuple[int, int], list[int]] = {}
    schedule = MixSchedule([MixPoint(0, {"a": 2, "b": 1, "c": 1})], canonical_nodes=nodes)
    for batch in all_ranks(corpora, 1, 120, shuffle=shuffle, schedule=schedule):
        for slot, (source, sample) in enumerate(batch):
            seen.setdefault((source, slot // 4), []).append(sample)
    parts: dict[int, list[set[int]]] = {}
    for (source, node), samples in seen.items():
        size = len(range(sizes[source] * node // nodes, sizes[source] * (node + 1) // nodes))
        laps = [samples[i : i + size] for i in range(0, len(samples), size)]
        assert all(len(set(lap)) == len(lap) for lap in laps)
        assert len(laps) > 1
        assert all(set(lap) == set(laps[0]) for lap in laps[:-1])
        assert (laps[0] == sorted(laps[0])) == (not shuffle)
        assert not shuffle or laps[0] != laps[1]
        parts.setdefault(source, []).append(set(laps[0]))
    for source, (first, second) in parts.items():
        assert not first & second
        assert first | second == set(range(sizes[source]))


@settings(max_examples=60, deadline=None)
@given(
    st.lists(st.integers(0, 9), min_size=3, max_size=8).filter(lambda s: sum(s) >= 16),
    st.lists(st.lists(st.integers(1, 6), min_size=1, max_size=3), max_size=2),
    st.integers(1, 4), st.integers(1, 7), st.data(),
)  # fmt: skip
def test_laps_read_everything_once_and_appended_shards_after_the_old(
    first: list[int], later: list[list[int]], nodes: int, block: int, data: st.DataObject
) -> None:
    options: dict[str, Any] = {"canonical_nodes": nodes, "shuffle_block_size": block}
    shards, order = list(first), SourceOrder("s", np.array(first), **options)
    read: list[list[tuple[int, int]]] = [[] for _ in range(nodes)]

    def go_on(upto: int) -> None:
        for node in range(nodes):
            ordinals = np.arange(len(read[node]), upto + node % 2)
            read[node] += zip(*(part.tolist() for part in order.locate(node, ordinals)), strict=True)

    reach = 0
    for more in later:
        reach += data.draw(st.integers(0, 25))
        go_on(reach)
        shards += more
        before, order = order, SourceOrder("s", np.array(shards), **options)
        order.load(before.to_dict(), np.array([len(samples) for samples in read]))
        again = SourceOrder("s", np.array(shards), **options)
        again.load(order.to_dict(), np.array([len(samples) for samples in read]))
        assert again.to_dict() == order.to_dict()
    everything = {(shard, i) for shard, size in enumerate(shards) for i in range(size)}
    go_on(reach + 3 * len(everything) + 3)
    for samples in read:
        times = Counter[tuple[int, int]]()
        for sample in samples:
            old = [s for s in times if s[0] < len(first)] if sample[0] >= len(first) else []
            assert not old or times[sample] <= max(times[s] for s in old)
            times[sample] += 1
        assert max(times.values()) - min(times[s] for s in times if s[0] < len(first)) <= 1
    assert set().union(*map(set, read)) == everything


def test_a_twelve_trillion_token_run_is_planned_in_seconds_and_little_memory() -> None:
    samples, per_shard, nodes = 12 * 10**12 // 4096, 4096, 64
    shards = np.full(samples // 3 // per_shard, per_shard)
    schedule = MixSchedule(
        [MixPoint(0, {"a": 3, "b": 1}), MixPoint(samples // nodes, {"b": 1, "c": 1}, "linear")],
        canonical_nodes=nodes,
    )
    orders = [SourceOrder(name, shards, canonical_nodes=nodes) for name in schedule.sources]
    start = samples // nodes // 2
    source, ordinal = schedule.order(start, start + 8192, node=63)
    for number, order in enumerate(orders):
        shard, index = order.locate(63, ordinal[source == number])
        assert len(set(zip(shard.tolist(), index.tolist(), strict=True))) == (source == number).sum()
        assert len(np.unique(shard)) <= 66  # a shuffle block's shards, so few have to be at hand
    tracemalloc.start()
    schedule.order(start, start + 8192, node=62)
    for order in orders:
        order.locate(62, np.arange(10**6, 10**6 + 8192))
    assert tracemalloc.get_traced_memory()[1] < 2**28
    tracemalloc.stop()


def test_packed_and_unpacked_and_remote_shards_read_alike(corpora: Path, tmp_path: Path) -> None:
    expected = all_ranks(corpora, 1, 20)
    plain = tmp_path / "plain"
    for name, size in (("a", 97), ("b", 60), ("c", 41)):
        write_source(plain / name / "train", range(size), compression=None)
    assert all_ranks(plain, 1, 20) == expected
    sources = {n: Source(str(tmp_path / "cache" / n), remote=str(corpora / n)) for n in "abc"}
    schedule = MixSchedule(POINTS, canonical_nodes=2)
    limit = 3000
    data = ScheduledDataset(sources, schedule, equal_steps(), cache_limit=limit, predownload=4)
    assert steps(data, 20) == expected
    kept = [path for path in (tmp_path / "cache").rglob("*.mds*") if path.is_file()]
    assert sum(path.stat().st_size for path in kept) <= limit + 2000
    assert len(kept) >= 1


def test_evaluation_reads_the_whole_split_in_order(corpora: Path) -> None:
    held_out = EvalDataset(str(corpora / "a"), seq_len=SEQ_LEN)
    assert [sample["tokens"][0] for sample in held_out] == list(range(7))
    assert len(held_out) == 7
    with pytest.raises(ValueError, match="tokens, not seq_len 16"):
        EvalDataset(str(corpora / "a"), seq_len=16, name="a")[0]


def test_held_out_samples_of_a_remote_are_fetched_when_read(corpora: Path, tmp_path: Path) -> None:
    held_out = EvalDataset(str(tmp_path), seq_len=SEQ_LEN, name="a", remote=str(corpora / "a"))
    assert len(held_out) == 7
    assert [path.name for path in tmp_path.rglob("*") if path.is_file()] == ["index.json"]
    assert [sample["tokens"][0] for sample in held_out] == list(range(7))
    with pytest.raises(ValueError, match=r"^sources.a: .*nowhere/val/index.json: cannot be fetched to"):
        EvalDataset(str(tmp_path), seq_len=SEQ_LEN, name="a", remote=str(tmp_path / "nowhere"))


def refuse_writing(monkeypatch: pytest.MonkeyPatch, folder: Path, reason: int) -> None:
    """As a read-only or full file system would, for root too."""

    real = open

    def guarded(path: Any, mode: str = "r", *args: Any, **kwargs: Any) -> Any:
        if "w" in mode and Path(path).is_relative_to(folder):
            raise OSError(reason, os.strerror(reason), str(path))
        return real(path, mode, *args, **kwargs)

    monkeypatch.setattr("builtins.open", guarded)


@pytest.fixture
def packed(
    corpora: Path, tmp_path: Path, tmp_path_factory: pytest.TempPathFactory, monkeypatch: pytest.MonkeyPatch
) -> Path:
    """The corpora with no shard unpacked; temporary files go to a folder of their own.

    Its path is short, for sockets of loader workers lie there, and theirs may have 107 characters.
    """
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path_factory.mktemp("t")))
    return Path(shutil.copytree(corpora, tmp_path / "data", ignore=shutil.ignore_patterns("*.mds")))


@pytest.mark.parametrize("reason", [errno.EROFS, errno.EACCES, errno.ENOSPC])
def test_a_folder_that_takes_no_files_is_read_alike(
    packed: Path, corpora: Path, monkeypatch: pytest.MonkeyPatch, reason: int
) -> None:
    expected, temporary = all_ranks(corpora, 1, 20), tempfile.gettempdir()
    before = sorted(packed.rglob("*"))
    refuse_writing(monkeypatch, packed, reason)
    assert steps(dataset(packed), 20, workers=2) == expected
    assert sorted(packed.rglob("*")) == before
    assert not dataset(packed)._stores["a"].prepare(0)  # found again by the next run

    limit = 1500
    assert steps(dataset(packed, cache_limit=limit, predownload=4), 20) == expected
    kept = list(Path(temporary).rglob("*.mds"))
    assert kept
    assert sum(path.stat().st_size for path in kept) <= limit + 1500

    monkeypatch.undo()
    monkeypatch.setattr("tempfile.tempdir", temporary)
    shutil.rmtree(packed / "a" / "val")
    write_source(packed / "a" / "val", range(100, 103))
    refuse_writing(monkeypatch, packed, reason)
    held_out = EvalDataset(str(packed / "a"), seq_len=SEQ_LEN)
    assert [sample["tokens"][0] for sample in held_out] == [100, 101, 102]


def test_no_room_anywhere_is_one_clear_line(packed: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for folder in (packed, Path(tempfile.gettempdir())):
        refuse_writing(monkeypatch, folder, errno.ENOSPC)
    message = r"^sources.\w: neither .*data/\w/train nor .*; set TMPDIR to"
    with pytest.raises(ValueError, match=message) as caught:
        next(iter(dataset(packed)))
    assert "\n" not in str(caught.value)


def test_a_temporary_folder_too_deep_for_sockets_of_workers_is_refused(
    corpora: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("tempfile.tempdir", f"/{'x' * 75}")
    with pytest.raises(ValueError, match=r"^TMPDIR: /x+ has 76 characters, and sockets of data\.num_workers"):
        build_loader(dataset(corpora), eos_id=0, pad_id=0, num_workers=1)
    build_loader(dataset(corpora), eos_id=0, pad_id=0)


def test_an_evicting_run_that_keeps_nothing_still_reads(packed: Path, corpora: Path) -> None:
    expected = all_ranks(corpora, 1, 20)
    data = dataset(packed, cache_limit=0, predownload=0)
    assert steps(data, 20) == expected
    assert len(list(packed.rglob("*.mds"))) <= 1 + len(list(packed.iterdir()))


def test_a_shard_dropped_as_soon_as_it_is_unpacked_is_not_taken_for_damaged(
    packed: Path, corpora: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As another process that evicts may do at any moment."""
    unpack, dropped = ShardStore._unpack, set[str]()

    def dropping(store: ShardStore, reader: Any, home: Path) -> bool:
        done = unpack(store, reader, home)
        raw = home / reader.raw_data.basename
        if str(raw) not in dropped:
            dropped.add(str(raw))
            raw.unlink()
        return done

    monkeypatch.setattr(ShardStore, "_unpack", dropping)
    assert steps(dataset(packed), 20) == all_ranks(corpora, 1, 20)
    assert dropped


def test_an_eos_belongs_to_the_document_that_it_ends() -> None:
    tokens = torch.tensor([[5, 9, 9, 6, 7, 9], [1, 2, 3, 4, 5, 6]])
    assert document_ids(tokens, 9).tolist() == [[0, 0, 1, 2, 2, 2], [0] * 6]
    samples = [{"tokens": row.numpy(), "source": i, "sample_id": 7} for i, row in enumerate(tokens)]
    batch = collate(samples, eos_id=9, pad_id=9)
    assert {key: (value.dtype, tuple(value.shape)) for key, value in batch.items()} == {
        "input_ids": (torch.int64, (2, 6)),
        "labels": (torch.int64, (2, 6)),
        "document_ids": (torch.int64, (2, 6)),
        "document_starts": (torch.int32, (2, 3)),
        "source": (torch.int64, (2,)),
        "sample_id": (torch.int64, (2,)),
    }
    assert batch["document_starts"].tolist() == [[0, 2, 3], [0, 6, 6]]
    assert batch["labels"].data_ptr() != batch["input_ids"].data_ptr()
    counted = collate(samples, eos_id=9, pad_id=9, count=lambda batch: (batch["labels"] > 5).sum(1))
    assert counted["loss_terms"] == [5, 1]


def test_samples_are_writable_copies(corpora: Path) -> None:
    sample = next(iter(dataset(corpora)))[0]
    sample["tokens"] += 1
    assert sample["tokens"].dtype == np.int64


def broken(corpora: Path, root: Path, how: str) -> Path:
    shutil.copytree(corpora, root, dirs_exist_ok=True)
    folder = root / "a" / "train"
    if how == "no index":
        (folder / "index.json").unlink()
    if how == "torn index":
        (folder / "index.json").write_text('{"shards": [')
    if how == "no shard":
        for path in folder.glob("shard*"):
            path.unlink()
    return root


@pytest.mark.parametrize(
    ("how", "message"),
    [
        ("no index", r"^sources.a: .*index.json does not exist"),
        ("torn index", r"^sources.a: .*index.json cannot be read"),
        ("no shard", r"^sources.a: .*shard.\d+.mds.* is missing"),
    ],
)
def test_damaged_data_is_refused_by_name(corpora: Path, tmp_path: Path, how: str, message: str) -> None:
    with pytest.raises(ValueError, match=message) as caught:
        steps(dataset(broken(corpora, tmp_path, how)), 20)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("workers", [0, 2])
@pytest.mark.parametrize(
    ("form", "message"),
    [
        ("packed", r"^sources.a: train/shard.\d+.mds.zstd cannot be had from .*/a \(Decompression error.*\)"),
        ("unpacked", r"^sources.a: .*/a/train/shard.\d+.mds is damaged: its content is not .*; restore it"),
    ],
)
def test_a_cut_shard_is_one_clear_line_from_workers_too(
    packed: Path, workers: int, form: str, message: str
) -> None:
    if form == "unpacked":
        shutil.rmtree(packed / "a" / "train")
        write_source(packed / "a" / "train", range(97), compression=None)
    for path in (packed / "a" / "train").glob("shard*"):
        os.truncate(path, path.stat().st_size // 2)
    with pytest.raises(ValueError, match=message) as caught:
        steps(dataset(packed), 20, workers)
    assert "\n" not in str(caught.value)
    assert any("Traceback" in note for note in getattr(caught.value, "__notes__", [])) == (workers > 0)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"predownload": -1}, r"^predownload: -1 is negative; use 0 or more"),
        ({"cache_limit": -5}, r"^cache_limit: -5 is negative; use 0 or more"),
        ({"world_size": 3, "rank": 0}, r"^global_batch_size: 8 is no multiple of the 3 ranks"),
        ({"nodes": 3}, r"^global_batch_size: 8 is no multiple of the 3 canonical nodes"),
        ({"nodes": 64, "batch": 64}, r"^sources.b: has 60 samples, too few for 64 canonical nodes"),
        ({"schedule": MixSchedule([MixPoint(0, {"x": 1})])}, r"^mix: x is no source; use a, b, c"),
    ],
)
def test_bad_options_are_refused(corpora: Path, options: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        dataset(corpora, **options)


@pytest.mark.parametrize("workers", [0, 2])
def test_another_sequence_length_is_refused(corpora: Path, workers: int) -> None:
    data = dataset(corpora, clock=Clock.of("9ba", seq_len=16, global_batch_size=8))
    message = r"^sources.\w: has samples of 8 tokens, not seq_len 16; set seq_len to 8 or prepare it again"
    with pytest.raises(ValueError, match=message) as caught:
        next(iter(build_loader(data, eos_id=0, pad_id=0, num_workers=workers)))
    assert "\n" not in str(caught.value)


@pytest.mark.slow
def test_reading_uses_no_shared_memory(corpora: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*args: Any, **kwargs: Any) -> None:
        raise AssertionError("a killed run would leave it behind")

    monkeypatch.setattr("multiprocessing.shared_memory.SharedMemory.__init__", refuse)
    next(iter(dataset(corpora)))
