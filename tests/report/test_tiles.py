"""The figures at the top of a report: last values, with means of what jumps."""

from __future__ import annotations

from pathlib import Path

from tiny_run import run_yaml

from dbrx_train.config import load
from dbrx_train.report.record import Record
from dbrx_train.report.render import _tiles


def record(folder: Path, peak: str) -> Record:
    metrics = {
        "loss/train/cross_entropy": dict(enumerate([9.0] * 18 + [4.0, 2.0])),
        "throughput/device/mfu": {0: 0.2, 1: float("inf"), 2: 0.4},
        "metrics/eval/web/cross_entropy": {0: 9.0, 19: 3.0},
    }
    config = load(run_yaml(folder, folder, "tiles"))
    return Record(config, "id", "FINISHED", 0.0, None, {"mfu.peak": peak}, metrics, [])


def test_means_stand_beside_last_values(tmp_path: Path) -> None:
    tiles = dict(_tiles(record(tmp_path, "9e14 FLOP/s, H100 data sheet, dense bf16")))
    assert tiles["training loss"] == "2.000 (mean of the last tenth 3.000)"
    assert tiles["MFU"] == "40.0% (mean 30.0%)"
    assert tiles["held-out web"] == "3.000"


def test_mfu_on_a_cpu_is_said_to_be_relative(tmp_path: Path) -> None:
    tiles = dict(_tiles(record(tmp_path, "1e11 FLOP/s, measured 2048x2048 matrix product")))
    assert "MFU" not in tiles
    assert tiles["MFU, relative to a measured matrix product"] == "40.0% (mean 30.0%)"
