"""Real runs that are stopped, or hang: what they save, say and exit with, and that they go on bit for bit."""

from __future__ import annotations

import json
import os
import re
import signal
import subprocess
import sys
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import mlflow
import pytest
import torch
from paths import HELPERS, ROOT
from ranks import free_port
from tiny_run import run_yaml, saved_tensors

from dbrx_train.checkpoint import folder as folders
from dbrx_train.config import ConfigError, load

SUPERVISION = ROOT / "scripts" / "supervision"
PROGRAM = HELPERS / "forked_ranks.py"
TERM, USR1, KILL, INT = map(int, (signal.SIGTERM, signal.SIGUSR1, signal.SIGKILL, signal.SIGINT))
STEPS = 14
SLOW = [("before_forward", 0), ("write", 4), ("eval_batch_start", 6)]
# Noise in the router, so that a random state which is not what it was shows in the weights.
OPTIONS = [f"max_duration={STEPS}ba", "model.router_jitter=0.2", "checkpoints.interval=4ba"]
OPTIONS += ["evaluation.interval=6ba", "evaluation.at_start=false", "evaluation.max_samples=2"]
OPTIONS += ["model.d_model=16", "model.n_layers=1", "model.n_heads=2", "model.n_kv_heads=1"]
OPTIONS += ["model.num_experts=4", "model.top_k=2"]


@dataclass
class Done:
    codes: list[int]
    out: list[str]
    err: list[str]

    @property
    def last_line(self) -> str:
        return self.out[0].strip().splitlines()[-1]


class Ranks:
    """Starts runs by the process that has imported all they need."""

    def __init__(self, process: subprocess.Popen[str], workplace: Path, folder: Path) -> None:
        self.process, self.workplace, self.folder = process, workplace, folder

    def train(self, name: str, *options: str, ranks: int = 1, faults: Sequence[list[Any]] = ()) -> Done:
        path = run_yaml(self.workplace, self.folder, name)
        said = self.folder / f"{name}.{time.monotonic_ns()}"
        said.mkdir()
        arguments = ["train", str(path), *OPTIONS, *options]
        job = {"ranks": ranks, "arguments": arguments, "faults": [*faults], "folder": str(said)}
        assert self.process.stdin is not None
        assert self.process.stdout is not None
        self.process.stdin.write(json.dumps(job) + "\n")
        self.process.stdin.flush()
        codes = json.loads(self.process.stdout.readline())
        out, err = ([(said / f"{which}{r}").read_text() for r in range(ranks)] for which in ("out", "err"))
        return Done(codes, out, err)

    def saved(self, name: str) -> list[str]:
        return [path.name for path in folders.saved(self.folder / name / "checkpoints")]

    def weights(self, name: str) -> dict[str, torch.Tensor]:
        return saved_tensors(self.folder / name / "checkpoints" / f"ba{STEPS}")

    def status(self, name: str) -> str:
        client = mlflow.MlflowClient(f"sqlite:///{self.workplace}/mlruns.db")
        experiment = client.get_experiment_by_name("dbrx-train")
        assert experiment is not None
        (found,) = client.search_runs([experiment.experiment_id], f"tags.run_name = '{name}'")
        return str(found.info.status)


@pytest.fixture(scope="module")
def ranks(workplace: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Ranks]:
    folder = tmp_path_factory.mktemp("stopping")
    env = {**os.environ, "OMP_NUM_THREADS": "1"}
    process = subprocess.Popen(
        [sys.executable, str(PROGRAM)],
        env=env,
        cwd=folder,
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
    )
    yield Ranks(process, workplace, folder)
    assert process.stdin is not None
    process.stdin.close()
    process.wait(timeout=30)


def same(one: dict[str, torch.Tensor], other: dict[str, torch.Tensor]) -> bool:
    return one.keys() == other.keys() and all(torch.equal(one[name], other[name]) for name in one)


@pytest.fixture(scope="module")
def undisturbed(ranks: Ranks) -> dict[str, torch.Tensor]:
    """The weights at the end of a run that nothing befalls."""
    # A first step, a save and an evaluation that last longer than a step may are no hangs.
    naps = [[0, moment, step, "nap"] for moment, step in SLOW]
    assert ranks.train("undisturbed", "watchdog.step=2s", ranks=2, faults=naps).codes == [0, 0]
    return ranks.weights("undisturbed")


@pytest.mark.slow
def test_stopped_in_every_way_on_one_rank_of_two_it_ends_as_if_undisturbed(
    ranks: Ranks, undisturbed: dict[str, torch.Tensor]
) -> None:
    stops: list[tuple[list[str], list[Any], set[int], str]] = [
        # To the workers of the loader too, which it can do without least
        (["data.num_workers=2"], [1, "before_forward", 1, f"group {TERM}"], {2}, "SIGTERM"),
        ([], [0, "write", 4, str(USR1)], {4}, "SIGUSR1"),
        ([], [1, "eval_batch_start", 6, str(TERM)], {6}, "SIGTERM"),
        # Written by a thread, beside the next step
        (["checkpoints.asynchronous=true"], [0, "write", 8, str(TERM)], {8, 9}, "SIGTERM"),
        (["checkpoints.interval=1ba"], [1, "write", 10, str(INT)], {10}, "Ctrl-C"),
        (
            ["checkpoints.interval=1ba", "checkpoints.asynchronous=true"],
            [0, "write", 11, str(INT)],
            {11, 12},
            "Ctrl-C",
        ),
        (["stop_after=1s"], [], {12, 13}, "stop_after"),
    ]
    for options, fault, steps, why in stops:
        done = ranks.train("stopped-together", *options, ranks=2, faults=[fault] if fault else [])
        assert done.codes == ([130, 130] if why == "Ctrl-C" else [75, 75]), (why, done)
        newest = ranks.saved("stopped-together")[0]
        assert newest in {f"ba{step}" for step in steps}, why
        where = ranks.folder / "stopped-together" / "checkpoints" / newest
        assert done.last_line == f"stopped ({why}); the same command goes on from {where}"
        assert ranks.status("stopped-together") == "KILLED"
        assert not any("Traceback" in err for err in done.err)
    assert ranks.train("stopped-together", ranks=2).codes == [0, 0]
    assert ranks.status("stopped-together") == "FINISHED"
    assert same(ranks.weights("stopped-together"), undisturbed)


@pytest.mark.slow
def test_under_torchrun_a_killed_rank_is_restarted_and_a_stopped_run_is_not(
    ranks: Ranks, undisturbed: dict[str, torch.Tensor]
) -> None:
    faults = [[1, "before_forward", 5, f"once {KILL}"], [0, "before_forward", 6, f"parent {TERM}"]]
    path = run_yaml(ranks.workplace, ranks.folder, "restarted")
    command = ["bash", str(SUPERVISION / "restart.sh"), "3", sys.executable, str(SUPERVISION / "torchrun.py")]
    command += ["--nproc-per-node=2", f"--master-port={free_port()}", str(PROGRAM), json.dumps(faults)]
    env = {**os.environ, "OMP_NUM_THREADS": "1"}
    done = subprocess.run(
        [*command, "train", str(path), *OPTIONS],
        env=env,
        cwd=ranks.folder,
        capture_output=True,
        text=True,
        timeout=200,
    )
    assert done.returncode == 75, done.stderr[-3000:]
    assert done.stderr.count("restart.sh: exit code 137; starting again, 2 times left") == 1
    assert f"goes on from {ranks.folder}/restarted/checkpoints/ba4, after" in done.stdout
    assert done.stdout.splitlines()[-1].startswith("stopped (SIGUSR1); the same command goes on from ")
    assert ranks.saved("restarted")[0] == "ba7"
    assert ranks.train("restarted", ranks=2).codes == [0, 0]
    assert same(ranks.weights("restarted"), undisturbed)


@pytest.mark.slow
def test_a_signal_before_the_first_step_loses_nothing(ranks: Ranks) -> None:
    fault = [1, "eval_batch_start", 0, str(TERM)]
    done = ranks.train("stopped-early", "evaluation.at_start=true", ranks=2, faults=[fault])
    assert done.codes == [75, 75], done
    assert ranks.saved("stopped-early") == []
    assert ranks.status("stopped-early") == "KILLED"


@pytest.mark.slow
def test_a_second_signal_or_the_end_of_the_grace_ends_it_at_once(ranks: Ranks) -> None:
    """The save sleeps for five minutes."""
    first = [0, "before_forward", 1, str(TERM)]
    stuck = [0, "write", 2, "sleep"]
    late = ranks.train("late", "preemption.grace_period=1s", faults=[first, stuck])
    assert late.codes == [128 + TERM]
    assert "was to stop (SIGTERM) within 1 s, and did not save in time" in late.err[0]
    assert ranks.saved("late") == []
    assert ranks.status("late") == "KILLED"
    # A launcher's copy of the first one does not count as a second.
    again = [0, "before_loss", 1, str(TERM)]
    second = [0, "batch_end", 2, f"later {USR1}"]
    done = ranks.train("twice", faults=[first, again, second, stuck])
    assert done.codes == [128 + USR1]


@pytest.mark.slow
def test_a_rank_that_hangs_is_named_with_its_stack(ranks: Ranks) -> None:
    hangs = ["watchdog.first_step=60s", "watchdog.step=4s", "evaluation.max_samples=0"]
    done = ranks.train("hang", *hangs, ranks=2, faults=[[1, "after_forward", 3, "sleep"]])
    assert done.codes == [74, 74]
    said = r"sees no progress for \d+ s: rank 1 is behind, last seen at step 3, in the forward and backward "
    assert re.search(said + r"passes; the foremost is at step 3, in the forward", done.err[0])
    assert "rank 1 is here:" in done.err[1]
    stacks = [(ranks.folder / "hang" / "stacks" / f"rank{rank}.txt").read_text() for rank in range(2)]
    assert "in do\n" in stacks[1]
    assert "in do\n" not in stacks[0]
    assert "allreduce" in stacks[0] or "all_reduce" in stacks[0] or "backward" in stacks[0]
    assert ranks.status("hang") == "FAILED"


@pytest.mark.slow
def test_a_loader_that_starves_is_told_from_a_collective_that_hangs(ranks: Ranks) -> None:
    options = ["watchdog.step=3s", "data.num_workers=1", "evaluation.max_samples=0"]
    done = ranks.train("starved", *options, ranks=2, faults=[[1, "batch", 3, "sleep"]])
    assert done.codes == [74, 74]
    assert (
        "rank 1 is behind, last seen at step 3, waiting for data; the foremost is at step 3, waiting for "
        in done.err[0]
    )
    alone = ranks.train("starved-alone", "watchdog.step=2s", *options[1:], faults=[[0, "batch", 3, "sleep"]])
    assert alone.codes == [74]
    assert "rank 0 sees no progress for 2 s: it is at step 3, waiting for data" in alone.err[0]


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
