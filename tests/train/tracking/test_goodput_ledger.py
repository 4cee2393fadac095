"""Goodput over a run's starts."""

from __future__ import annotations

import json
import time
from pathlib import Path
from typing import Any

import pytest

from dbrx_train.train.tracking.goodput_ledger import GoodputLedger


def written(folder: Path, *entries: tuple[float, int, float, float]) -> None:
    keys = ("time", "step", "elapsed", "useful")
    lines = [json.dumps(dict(zip(keys, entry, strict=True))) for entry in entries]
    (folder / "time.jsonl").write_text("\n".join(lines) + "\n")


def last(folder: Path) -> dict[str, Any]:
    found: dict[str, Any] = json.loads((folder / "time.jsonl").read_text().splitlines()[-1])
    return found


def test_the_first_start(tmp_path: Path) -> None:
    ledger = GoodputLedger(tmp_path, 0, ago=20.0)
    ledger.add(10, 5.0)
    ledger.add(20, 7.0)
    assert ledger.useful == 12
    assert 20 <= ledger.elapsed < 21
    assert ledger.goodput == pytest.approx(12 / 20, rel=0.05)
    assert last(tmp_path)["useful"] == 12
    assert last(tmp_path)["step"] == 20


def test_what_a_restart_lost_is_taken_back_and_the_time_between_counts(tmp_path: Path) -> None:
    now = time.time()
    written(tmp_path, (now - 160, 10, 50, 40), (now - 130, 20, 80, 65), (now - 110, 30, 100, 80))
    ledger = GoodputLedger(tmp_path, 20, ago=10.0)  # started 100 s after the last line, from step 20
    assert ledger.useful == 65
    assert ledger.elapsed == pytest.approx(100 + 110, abs=1)
    ledger.add(30, 20.0)
    # And once more, from before that, after which nothing of either try counts.
    again = GoodputLedger(tmp_path, 12, ago=0.0)
    assert again.useful == 40
    assert GoodputLedger(tmp_path, 30).useful == 85


def test_a_roll_back_within_a_start(tmp_path: Path) -> None:
    ledger = GoodputLedger(tmp_path, 0)
    ledger.add(10, 5.0)
    ledger.add(20, 5.0)
    ledger.rewind(10)
    ledger.add(15, 1.0)
    assert ledger.useful == 6
    assert GoodputLedger(tmp_path, 15).useful == 6


def test_a_clock_that_jumps_back_and_a_torn_line(tmp_path: Path) -> None:
    written(tmp_path, (time.time() + 3600, 10, 50, 40))
    with (tmp_path / "time.jsonl").open("a") as file:
        file.write('{"time": 179')
    ledger = GoodputLedger(tmp_path, 10)
    assert 50 <= ledger.elapsed < 51
    ledger.add(20, 4.0)
    assert GoodputLedger(tmp_path, 20).useful == 44


def test_a_disk_that_takes_nothing_stops_no_run(tmp_path: Path) -> None:
    ledger = GoodputLedger(tmp_path / "gone", 0)
    with pytest.warns(UserWarning, match="goodput is not kept"):
        ledger.add(1, 1.0)
    assert ledger.useful == 1


def test_work_that_is_lost_though_the_run_goes_on(tmp_path: Path) -> None:
    ledger = GoodputLedger(tmp_path, 0)
    ledger.add(10, 5.0)
    ledger.add(20, 5.0)
    ledger.lose(12)
    ledger.add(30, 1.0)
    assert ledger.useful == 6
    assert GoodputLedger(tmp_path, 30).useful == 6
