"""Held-out loss by command: what the run itself logged, and in 8 bits nearly that."""

from __future__ import annotations

import re
import subprocess
import sys
from pathlib import Path

import pytest
from conftest import run_yaml

from dbrx_train.config import load
from dbrx_train.train.builder import run


@pytest.mark.slow
def test_the_command_gives_the_losses_that_the_run_ended_with(
    workplace: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path = run_yaml(workplace, tmp_path, "evaluated")
    run(load(path))
    said = capsys.readouterr().out
    ended = re.findall(r"held-out (\w+): loss .* ([\d.]+) after 1,024 tokens", said)
    assert len(ended) == 2
    command = [sys.executable, "-m", "dbrx_train", "eval", str(path)]
    for options in ([], ["--int8"]):
        done = subprocess.run([*command, *options], capture_output=True, text=True, timeout=200)
        assert done.returncode == 0, done.stderr
        shown = re.findall(r"held-out (\w+): loss ([\d.]+) over [\d,]+ tokens", done.stdout)
        assert dict(shown).keys() == dict(ended).keys()
        for source, loss in shown:
            assert float(loss) == pytest.approx(float(dict(ended)[source]), abs=0.05 if options else 6e-4)
        assert ("int8: logits are off by" in done.stderr) == bool(options)
    done = subprocess.run([*command, "--weights", "nowhere"], capture_output=True, text=True, timeout=100)
    assert done.returncode == 2
    assert done.stderr.startswith("dbrx-train: nowhere: neither a run")
    command += ["evaluation.max_samples=0"]
    done = subprocess.run(command, capture_output=True, text=True, timeout=100)
    assert done.returncode == 2
    assert "nothing is held out of its sources, or evaluation.max_samples is 0" in done.stderr
