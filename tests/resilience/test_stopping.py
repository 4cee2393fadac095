"""Real runs that are stopped, or hang: what they save, say and exit with, and that they go on bit for bit."""

from __future__ import annotations

import json
import os
import re
import signal
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from paths import HELPERS, ROOT
from ranks import free_port
from tiny_run import mlflow_run, run_yaml, saved_tensors
from warm import Rank, Warm, equal

from dbrx_train.checkpoint import folder as folders
from dbrx_train.config import ConfigError, load

SUPERVISION = ROOT / "scripts" / "supervision"
PROGRAM = HELPERS / "deeds.py"
TERM, USR1, KILL, INT = map(int, (signal.SIGTERM, signal.SIGUSR1, signal.SIGKILL, signal.SIGINT))
STEPS = 14
SLOW = [("before_forward", 0), ("write", 4), ("eval_batch_start", 6)]
# Noise in the router, so that a random state which is not what it was shows in the weights.
OPTIONS = [f"max_duration={STEPS}ba", "model.router_jitter=0.2", "checkpoints.interval=4ba"]
OPTIONS += ["evaluation.interval=6ba", "evaluation.at_start=false", "evaluation.max_samples=2"]
OPTIONS += ["model.d_model=16", "model.n_layers=1", "model.n_heads=2", "model.n_kv_heads=1"]
OPTIONS += ["model.num_experts=4", "model.top_k=2"]


def fault(rank: int, at: str, step: int, deed: str) -> dict[str, Any]:
    return {"kind": "deed", "rank": rank, "at": at, "step": step, "deed": deed}


def exit_codes(done: list[Rank]) -> list[int]:
    return [rank.code for rank in done]


class Runs:
    """Runs that faults happen to, each in a folder of its own."""

    def __init__(self, warm: Warm, workplace: Path, folder: Path) -> None:
        self.warm, self.workplace, self.folder = warm, workplace, folder

    def train(
        self, name: str, *options: str, ranks: int = 1, faults: Sequence[dict[str, Any]] = ()
    ) -> list[Rank]:
        command = ["train", str(run_yaml(self.workplace, self.folder, name)), *OPTIONS, *options]
        return self.warm.apart(*command, ranks=ranks, faults=faults, cwd=str(self.folder), seconds=90)

    def saved(self, name: str) -> list[str]:
        return [path.name for path in folders.saved(self.folder / name / "checkpoints")]

    def weights(self, name: str) -> dict[str, torch.Tensor]:
        return saved_tensors(self.folder / name / "checkpoints" / f"ba{STEPS}")

    def status(self, name: str) -> str:
        return str(mlflow_run(self.workplace, name)[1].info.status)


@pytest.fixture(scope="module")
def runs(warm: Warm, workplace: Path, tmp_path_factory: pytest.TempPathFactory) -> Runs:
    return Runs(warm, workplace, tmp_path_factory.mktemp("stopping"))


@pytest.fixture(scope="module")
def undisturbed(runs: Runs) -> dict[str, torch.Tensor]:
    """The weights at the end of a run that nothing befalls."""
    # A first step, a save and an evaluation that last longer than a step may are no hangs.
    naps = [fault(0, moment, step, "nap") for moment, step in SLOW]
    assert exit_codes(runs.train("undisturbed", "watchdog.step=2s", ranks=2, faults=naps)) == [0, 0]
    return runs.weights("undisturbed")


@pytest.mark.slow
def test_stopped_in_every_way_on_one_rank_of_two_it_ends_as_if_undisturbed(
    runs: Runs, undisturbed: dict[str, torch.Tensor]
) -> None:
    stops: list[tuple[list[str], list[dict[str, Any]], set[int], str]] = [
        # To the workers of the loader too, which it can do without least
        (["data.num_workers=2"], [fault(1, "before_forward", 1, f"group {TERM}")], {2}, "SIGTERM"),
        ([], [fault(0, "write", 4, str(USR1))], {4}, "SIGUSR1"),
        ([], [fault(1, "eval_batch_start", 6, str(TERM))], {6}, "SIGTERM"),
        # Written by a thread, beside the next step
        (["checkpoints.asynchronous=true"], [fault(0, "write", 8, str(TERM))], {8, 9}, "SIGTERM"),
        (["checkpoints.interval=1ba"], [fault(1, "write", 10, str(INT))], {10}, "Ctrl-C"),
        (
            ["checkpoints.interval=1ba", "checkpoints.asynchronous=true"],
            [fault(0, "write", 11, str(INT))],
            {11, 12},
            "Ctrl-C",
        ),
        (["stop_after=1s"], [], {12, 13}, "stop_after"),
    ]
    for options, faults, steps, why in stops:
        done = runs.train("stopped-together", *options, ranks=2, faults=faults)
        assert exit_codes(done) == ([130, 130] if why == "Ctrl-C" else [75, 75]), (why, done)
        newest = runs.saved("stopped-together")[0]
        assert newest in {f"ba{step}" for step in steps}, why
        where = runs.folder / "stopped-together" / "checkpoints" / newest
        last = done[0].out.strip().splitlines()[-1]
        assert last == f"stopped ({why}); the same command goes on from {where}"
        assert runs.status("stopped-together") == "KILLED"
        assert not any("Traceback" in rank.err for rank in done)
    assert exit_codes(runs.train("stopped-together", ranks=2)) == [0, 0]
    assert runs.status("stopped-together") == "FINISHED"
    assert equal(runs.weights("stopped-together"), undisturbed)


@pytest.mark.slow
def test_under_torchrun_a_killed_rank_is_restarted_and_a_stopped_run_is_not(
    runs: Runs, undisturbed: dict[str, torch.Tensor]
) -> None:
    faults = [
        fault(1, "before_forward", 5, f"once {KILL}"),
        fault(0, "before_forward", 6, f"parent {TERM}"),
    ]
    path = run_yaml(runs.workplace, runs.folder, "restarted")
    command = ["bash", str(SUPERVISION / "restart.sh"), "3", sys.executable, str(SUPERVISION / "torchrun.py")]
    command += ["--nproc-per-node=2", f"--master-port={free_port()}", str(PROGRAM), json.dumps(faults)]
    env = {**os.environ, "OMP_NUM_THREADS": "1"}
    done = subprocess.run(
        [*command, "train", str(path), *OPTIONS],
        env=env,
        cwd=runs.folder,
        capture_output=True,
        text=True,
        timeout=200,
    )
    assert done.returncode == 75, done.stderr[-3000:]
    assert done.stderr.count("restart.sh: exit code 137; starting again, 2 times left") == 1
    assert f"goes on from {runs.folder}/restarted/checkpoints/ba4, after" in done.stdout
    assert done.stdout.splitlines()[-1].startswith("stopped (SIGUSR1); the same command goes on from ")
    assert runs.saved("restarted")[0] == "ba7"
    assert exit_codes(runs.train("restarted", ranks=2)) == [0, 0]
    assert equal(runs.weights("restarted"), undisturbed)


@pytest.mark.slow
def test_a_signal_before_the_first_step_loses_nothing(runs: Runs) -> None:
    early = fault(1, "eval_batch_start", 0, str(TERM))
    done = runs.train("stopped-early", "evaluation.at_start=true", ranks=2, faults=[early])
    assert exit_codes(done) == [75, 75], done
    assert runs.saved("stopped-early") == []
    assert runs.status("stopped-early") == "KILLED"


@pytest.mark.slow
def test_a_second_signal_or_the_end_of_the_grace_ends_it_at_once(runs: Runs) -> None:
    """The save sleeps for five minutes."""
    first = fault(0, "before_forward", 1, str(TERM))
    stuck = fault(0, "write", 2, "sleep")
    (late,) = runs.train("late", "preemption.grace_period=1s", faults=[first, stuck])
    assert late.code == 128 + TERM
    assert "was to stop (SIGTERM) within 1 s, and did not save in time" in late.err
    assert runs.saved("late") == []
    assert runs.status("late") == "KILLED"
    # A launcher's copy of the first one does not count as a second.
    again = fault(0, "before_loss", 1, str(TERM))
    second = fault(0, "batch_end", 2, f"later {USR1}")
    done = runs.train("twice", faults=[first, again, second, stuck])
    assert exit_codes(done) == [128 + USR1]


@pytest.mark.slow
def test_a_rank_that_hangs_is_named_with_its_stack(runs: Runs) -> None:
    hangs = ["watchdog.first_step=60s", "watchdog.step=4s", "evaluation.max_samples=0"]
    done = runs.train("hang", *hangs, ranks=2, faults=[fault(1, "after_forward", 3, "sleep")])
    assert exit_codes(done) == [74, 74]
    said = r"sees no progress for \d+ s: rank 1 is behind, last seen at step 3, in the forward and backward "
    assert re.search(said + r"passes; the foremost is at step 3, in the forward", done[0].err)
    assert "rank 1 is here:" in done[1].err
    stacks = [(runs.folder / "hang" / "stacks" / f"rank{rank}.txt").read_text() for rank in range(2)]
    assert "in do\n" in stacks[1]
    assert "in do\n" not in stacks[0]
    assert "allreduce" in stacks[0] or "all_reduce" in stacks[0] or "backward" in stacks[0]
    assert runs.status("hang") == "FAILED"


@pytest.mark.slow
def test_a_loader_that_starves_is_told_from_a_collective_that_hangs(runs: Runs) -> None:
    options = ["watchdog.step=3s", "data.num_workers=1", "evaluation.max_samples=0"]
    done = runs.train("starved", *options, ranks=2, faults=[fault(1, "batch", 3, "sleep")])
    assert exit_codes(done) == [74, 74]
    assert (
        "rank 1 is behind, last seen at step 3, waiting for data; the foremost is at step 3, waiting for "
        in done[0].err
    )
    starved = fault(0, "batch", 3, "sleep")
    (alone,) = runs.train("starved-alone", "watchdog.step=2s", *options[1:], faults=[starved])
    assert alone.code == 74
    assert "rank 0 sees no progress for 2 s: it is at step 3, waiting for data" in alone.err


def test_spans_of_time(tmp_path: Path, workplace: Path) -> None:
    path = run_yaml(workplace, tmp_path, "spans")
    config = load(
        path,
        ["stop_after=3h50m", "preemption.grace_period=90s", "watchdog.first_step=1d", "watchdog.step=null"],
    )
    assert config.stop_after_seconds == (3 * 60 + 50) * 60
    assert config.preemption.seconds == 90
    assert config.watchdog.seconds == (86400, None)
    for wrong in ("soon", "3", "h", "1h ago", "5m3h", "0s", "-1s", ""):
        for key in ("stop_after", "preemption.grace_period", "watchdog.first_step", "watchdog.step"):
            with pytest.raises(ConfigError, match=f"{key}: '{wrong}' is not a span of time; write it like"):
                load(path, [f"{key}='{wrong}'"])
