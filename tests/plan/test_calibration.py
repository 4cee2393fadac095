"""The plan's step time beside published runs."""

from __future__ import annotations

import statistics
import sys

import pytest
from paths import ROOT

sys.path.insert(0, str(ROOT / "scripts"))
import plan_calibration as calibration

HEADER = ",".join(calibration.COLUMNS)
ROW = "MPT-7b,4096,32,32,6658859008,2048,128,H100-80GB,amp_bf16,6,1,FULL_SHARD,False,10475"


def test_published_runs_are_predicted() -> None:
    rows = calibration.read([calibration.VISIBLE])
    assert len(rows) == 103
    sizes = [abs(error) for error in calibration.errors(rows)]
    assert statistics.median(sizes) <= 0.08
    assert max(sizes) <= 0.25


def test_the_last_line_sums_up(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.setattr(sys, "argv", ["plan_calibration.py", str(calibration.VISIBLE)])
    calibration.main()
    *lines, last = capsys.readouterr().out.splitlines()
    assert len(lines) == 103
    assert last.startswith("rows 103, median ")
    assert last.endswith(" %")


def test_rows_that_are_not_modelled_are_named(
    tmp_path: pytest.TempPathFactory, capsys: pytest.CaptureFixture[str]
) -> None:
    file = tmp_path / "rows.csv"
    bad = [
        ROW.replace("amp_bf16", "amp_fp8"),
        ROW.replace("H100-80GB", "H900"),
        ROW.replace("FULL_SHARD", "NO_SHARD"),
        ROW.replace("10475", ""),
    ]
    file.write_text("\n".join([HEADER, ROW, *bad]) + "\n")
    (row,) = calibration.read([file])
    assert row.predicted() == pytest.approx(10475, rel=0.25)
    said = capsys.readouterr().err.splitlines()
    assert [line.split(": left out: ")[0] for line in said] == [f"{file}, line {n}" for n in (3, 4, 5, 6)]


def test_constants_are_those_of_the_fit() -> None:
    """Fitted anew to half of the rows, the constants predict the other half as well."""
    pytest.importorskip("scipy")
    rows = calibration.read([calibration.VISIBLE])
    shared, own = calibration.fit(rows[::2])
    left = calibration.errors(rows[1::2], lambda row: row.predicted(shared, own))
    assert statistics.median(map(abs, left)) <= 0.08
    assert max(map(abs, left)) <= 0.27
