"""Stopped anywhere and resumed anywhere, a run sees what an uninterrupted one would have seen."""

from __future__ import annotations

import json
import os
import shutil
import signal
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from numbered_data import POINTS, SEQ_LEN, all_ranks, dataset, equal_steps, steps, write_source
from paths import HELPERS
from ranks import free_port

from dbrx_train.data.mix.schedule import MixPoint, MixSchedule
from dbrx_train.data.stream.dataset import ScheduledDataset
from dbrx_train.data.stream.shards import Source

STEP_EDGES = [1, 3, 7, 10, 13, 24]  # mid-stage, mid-ramp, the ramp's end, an epoch's last batch


def plain(state: Any) -> bool:
    if isinstance(state, dict):
        return all(isinstance(key, str) and plain(value) for key, value in state.items())
    return all(map(plain, state)) if isinstance(state, list) else isinstance(state, str | int | float | bool)


@pytest.mark.parametrize("ranks", [1, 2, 4])
def test_resumed_on_other_ranks_and_workers_it_goes_on_at_the_next_sample(corpora: Path, ranks: int) -> None:
    whole = all_ranks(corpora, 1, 40)
    for step in STEP_EDGES:
        state = json.loads(json.dumps(dataset(corpora, rank=0, world_size=8).state_dict(step * 8, True)))
        assert plain(state)
        assert all_ranks(corpora, ranks, 40 - step, state) == whole[step:]
    assert all_ranks(corpora, ranks, 9, state, workers=2) == whole[24:33]


def test_a_resumed_run_can_be_resumed_and_counts_from_its_own_beginning(corpora: Path) -> None:
    whole = all_ranks(corpora, 1, 30)
    first = dataset(corpora)
    second = dataset(corpora)
    second.load_state_dict(first.state_dict(10 * 8, True))
    state = second.state_dict(5 * 8, from_beginning=False)
    assert state == second.state_dict(15 * 8, True) == first.state_dict(15 * 8, True)
    assert all_ranks(corpora, 1, 15, state) == whole[15:]


def test_another_global_batch_from_here_on_goes_on_with_the_same_samples(corpora: Path) -> None:
    state = dataset(corpora).state_dict(10 * 8, True)
    with pytest.raises(ValueError, match=PAST_SIZE) as caught:
        dataset(corpora, batch=4).load_state_dict(state)
    assert "\n" not in str(caught.value)
    clock = equal_steps(8).with_batch_size(f"{10 * 8 * SEQ_LEN}tok", 4)
    small = all_ranks(corpora, 1, 20, state, clock=clock)
    assert {len(batch) for batch in small} == {4}
    whole = all_ranks(corpora, 1, 20)[10:]
    assert {sample for batch in small for sample in batch} == {s for batch in whole for s in batch}


PAST_SIZE = (
    r"^global_batch_size: the past cannot change: after 0 tokens a step had 64, and now has 32; what was is "
    r"kept with batch_size_warmup: \[\{until: 640tok, global_batch_size: 8\}\]$"
)


def test_an_edited_future_keeps_the_past_and_repeats_nothing(corpora: Path, tmp_path: Path) -> None:
    shutil.copytree(corpora, tmp_path, dirs_exist_ok=True)
    points = [MixPoint(0, {"a": 3, "b": 1})]
    old = MixSchedule(points, canonical_nodes=2)
    whole = all_ranks(tmp_path, 1, 10, schedule=old)
    state = dataset(tmp_path, schedule=old).state_dict(10 * 8, True)
    write_source(tmp_path / "0new" / "train", range(80))
    new = MixSchedule(
        [*points, MixPoint(40, {"0new": 3, "a": 1})], sources=["0new", "a", "b"], canonical_nodes=2
    )
    following = all_ranks(tmp_path, 2, 10, state, schedule=new)
    resumed = dataset(tmp_path, schedule=new)
    resumed.load_state_dict(state)
    assert resumed.schedule.sources == ("a", "b", "0new")
    served = [sample for batch in whole + following for sample in batch]
    assert len(set(served)) == len(served)
    assert 58 <= sum(source == 2 for source, _ in served) <= 62
    assert all_ranks(tmp_path, 1, 5, resumed.state_dict(15 * 8, True), schedule=new) == following[5:]


def test_a_changed_past_is_refused(corpora: Path) -> None:
    state = dataset(corpora).state_dict(10 * 8, True)
    edited = [POINTS[0], MixPoint(30, {"b": 1})]
    with pytest.raises(
        ValueError, match=r"^mix: the past cannot change: at sample 40 it was a 0.25, b 0.75 and"
    ):
        dataset(corpora, schedule=MixSchedule(edited, sources="abc", canonical_nodes=2)).load_state_dict(
            state
        )
    with pytest.raises(ValueError, match=r"^shuffle_seed: is 1, but the run began with 0"):
        dataset(corpora, shuffle_seed=1).load_state_dict(state)
    with pytest.raises(ValueError, match=r"^canonical_nodes: is 4, but the run began with 2"):
        dataset(corpora, nodes=4).load_state_dict(state)


def test_other_data_is_refused_and_another_path_is_not(corpora: Path, tmp_path: Path) -> None:
    state, whole = dataset(corpora).state_dict(10 * 8, True), all_ranks(corpora, 1, 20)
    moved = Path(shutil.copytree(corpora, tmp_path / "moved"))
    assert all_ranks(moved, 1, 10, state) == whole[10:]
    shutil.rmtree(moved / "b" / "train")
    write_source(moved / "b" / "train", range(1, 61))
    with pytest.raises(
        ValueError, match=r"^sources.b: shards 0 to \d have fingerprint \w{12}, and the run began"
    ):
        dataset(moved).load_state_dict(state)
    shutil.rmtree(moved / "b" / "train")
    write_source(moved / "b" / "train", range(20))
    with pytest.raises(ValueError, match=r"^sources.b: has \d shards, and the run began with \d"):
        dataset(moved).load_state_dict(state)


def append(folder: Path, samples: range) -> None:
    """Add shards to a source's folder and index, after those that are there."""
    write_source(folder / "more", samples)
    index, more = (json.loads((path / "index.json").read_text()) for path in (folder, folder / "more"))
    for shard in more["shards"]:
        for kind in ("raw_data", "zip_data"):
            shard[kind]["basename"] = f"more/{shard[kind]['basename']}"
    (folder / "index.json").write_text(json.dumps(index | {"shards": index["shards"] + more["shards"]}))


def test_appended_shards_are_read_after_the_old_ones(corpora: Path, tmp_path: Path) -> None:
    shutil.copytree(corpora, tmp_path, dirs_exist_ok=True)
    schedule = MixSchedule([MixPoint(0, {"a": 1})], canonical_nodes=1)
    state = dataset(tmp_path, schedule=schedule).state_dict(6 * 8, True)
    head = [n for batch in all_ranks(tmp_path, 1, 6, schedule=schedule) for _, n in batch]
    append(tmp_path / "a" / "train", range(97, 120))
    tail = [n for batch in all_ranks(tmp_path, 2, 40, state, schedule=schedule) for _, n in batch]
    order = head + tail
    assert sorted(order[:97]) == list(range(97))
    assert sorted(order[97:120]) == list(range(97, 120))
    assert sorted(order[120:240]) == list(range(120))


def run_ranks(root: Path, ranks: int, *state: str) -> Any:
    world = {
        "MASTER_ADDR": "127.0.0.1",
        "MASTER_PORT": str(free_port()),
        "WORLD_SIZE": str(ranks),
        "OMP_NUM_THREADS": "1",
    }
    processes = [
        subprocess.Popen(
            [sys.executable, str(HELPERS / "dataset_ranks.py"), str(root), *state],
            env=os.environ | world | {"RANK": str(r)},
            stdout=subprocess.PIPE,
            text=True,
        )
        for r in range(ranks)
    ]
    try:
        output = [process.communicate(timeout=120)[0] for process in processes]
    finally:
        for process in processes:
            process.kill()
    return [[tuple(sample) for sample in batch] for batch in json.loads(output[0])]


@pytest.mark.slow
def test_real_processes_see_the_same_and_resume_alike(corpora: Path) -> None:
    whole = all_ranks(corpora, 1, 24)
    assert run_ranks(corpora, 2) == whole[:12]
    state = dataset(corpora).state_dict(12 * 8, True)
    assert run_ranks(corpora, 2, json.dumps(state)) == whole[12:]


@pytest.mark.slow
def test_after_sigkill_it_starts_again_without_cleaning(corpora: Path, tmp_path: Path) -> None:
    command = [sys.executable, str(HELPERS / "counting_loader.py"), str(tmp_path), str(corpora)]
    for _ in range(2):
        process = subprocess.Popen(command, stdout=subprocess.PIPE, text=True, start_new_session=True)
        assert process.stdout is not None
        assert [process.stdout.readline().strip() for _ in range(3)] == ["0", "1", "2"]
        os.killpg(process.pid, signal.SIGKILL)
        process.wait(timeout=30)
    sources = {name: Source(str(tmp_path / name), remote=str(corpora / name)) for name in "abc"}
    schedule = MixSchedule(POINTS, canonical_nodes=2)
    again = ScheduledDataset(sources, schedule, equal_steps())
    assert steps(again, 20) == all_ranks(corpora, 1, 20)
