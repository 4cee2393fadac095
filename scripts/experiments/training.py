"""Training an experiment's runs through ``dbrx-train train``, once each, whoever else works on them."""

from __future__ import annotations

import fcntl
import json
import os
import shutil
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from omegaconf import OmegaConf
from spec import Budget, Experiment, Run, final_runs, tuning_runs

from dbrx_train.config import load
from dbrx_train.files import atomic_write
from dbrx_train.report.record import read

RESULT = "result.json"
Train = Callable[[Path], int]


def command(config: Path) -> int:
    """``dbrx-train train``, its output beside the configuration; returns the exit code.

    Stopped, it stops the run, which saves first.
    """
    told = [sys.executable, "-m", "dbrx_train", "train", str(config)]
    with (
        open(config.with_suffix(".log"), "a", encoding="utf-8") as log,
        subprocess.Popen(told, stdout=log, stderr=subprocess.STDOUT) as process,
    ):
        try:
            return process.wait()
        except BaseException:
            process.terminate()
            raise


class Workshop:
    """The folder in which runs of all experiments lie: equal runs of several experiments are made once.

    Several processes may work in one folder at once. A run that is finished has a ``result.json``.
    """

    def __init__(self, folder: Path, data: Path, train: Train = command) -> None:
        self.folder, self.data, self.train = folder.resolve(), data.resolve(), train
        self.folder.mkdir(parents=True, exist_ok=True)

    def result(self, run: Run) -> dict[str, Any] | None:
        """What a finished run came to."""
        try:
            return dict(json.loads((self.folder / run.name / RESULT).read_text()))
        except FileNotFoundError:
            return None

    def finish(self, wanted: Callable[[], Sequence[Run]]) -> None:
        """Train what is wanted and not finished, in order, until nothing is.

        ``wanted`` is asked again after each run, since it may depend on results. A run that another process
        trains is waited for last. Raises RuntimeError where a run fails.
        """
        while todo := [run for run in wanted() if self.result(run) is None]:
            ready = (run for run in todo if self._shorter(run, todo) is None)
            if not any(self._claim_and_train(run) for run in ready):
                time.sleep(5)

    @staticmethod
    def _shorter(run: Run, among: Sequence[Run]) -> Run | None:
        """The longest run that this one begins like."""
        alike = [o for o in among if (o.arm, o.lr, o.seed) == (run.arm, run.lr, run.seed)]
        return max((o for o in alike if o.steps < run.steps), key=lambda o: o.steps, default=None)

    def _claim_and_train(self, run: Run) -> bool:
        """False if another process has the run."""
        folder = self.folder / run.name
        with _claimed(self.folder / f"{run.name}.lock") as mine:
            if not mine:
                return False
            if self.result(run) is None:
                print(f"{time.strftime('%H:%M:%S')} {run.name}, learning rate {run.lr:g}", flush=True)
                self._train(run, folder)
        return True

    def _train(self, run: Run, folder: Path) -> None:
        config = self.folder / f"{run.name}.yaml"
        own = {
            "run_name": run.name,
            "folder": str(folder),
            "variables": {"data": str(self.data)},
            "logging": {"mlflow_uri": f"sqlite:///{self.folder}/mlruns.db", "experiment": "experiments"},
        }
        config.write_text(OmegaConf.to_yaml(OmegaConf.merge(run.config, own)))
        self._branch(run, folder)
        if code := self.train(config):
            raise RuntimeError(f"{run.name} ended with exit code {code}; see {config.with_suffix('.log')}")
        shown = json.dumps(_result(run, folder), indent=1)
        with atomic_write(folder / RESULT) as partial:
            partial.write_text(shown + "\n")

    def _branch(self, run: Run, folder: Path) -> None:
        """Begin a longer run with the checkpoint of a shorter one from before its learning rate fell."""
        if (folder / "checkpoints").exists():
            return
        begun = [
            path / "checkpoints" / f"ba{other.stable_steps}"
            for other, path in self._others(run)
            if other.steps < run.steps
        ]
        found = [path for path in begun if (path / "checkpoint.json").is_file()]
        if found:
            longest = max(found, key=lambda path: int(path.name.removeprefix("ba")))
            partial = folder / f"branch.{os.getpid()}.tmp"
            shutil.rmtree(partial, ignore_errors=True)
            shutil.copytree(longest, partial / longest.name)
            partial.rename(folder / "checkpoints")

    def _others(self, run: Run) -> Iterator[tuple[Run, Path]]:
        for file in self.folder.glob(f"{run.arm}-*/{RESULT}"):
            made = json.loads(file.read_text())
            other = Run(run.arm, made["lr"], made["seed"], made["steps"], made["config"])
            if _past(other) == _past(run):
                yield other, file.parent


def _past(run: Run) -> str:
    """All that decides a run before its learning rate falls."""
    config: Any = json.loads(json.dumps(run.config))
    del config["max_duration"], config["checkpoints"], config["optimization"]["learning_rate"]["decay"]
    return json.dumps(config, sort_keys=True)


@contextmanager
def _claimed(path: Path) -> Iterator[bool]:
    with open(path, "w") as lock:
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            yield False
        else:
            yield True


def _result(run: Run, folder: Path) -> dict[str, Any]:
    """Held-out losses over the run, and the last value of everything else that was logged."""
    record = read(folder)
    config = load(folder / "config.yaml")
    curves = {name: steps for name, steps in record.metrics.items() if name.startswith("metrics/eval/")}
    kept = ("experts/", "loss/", "router/")
    return {
        "arm": run.arm,
        "lr": run.lr,
        "seed": run.seed,
        "steps": run.steps,
        "tokens_per_step": config.clock.total_tokens // run.steps,
        "flops_per_token": config.model.flops_per_token(config.data.seq_len),
        "total_parameters": config.model.num_params,
        "active_parameters": config.model.num_active_params,
        "curves": {n.split("/")[2]: s for n, s in curves.items() if n.endswith("/cross_entropy")},
        "last": {n: list(s.values())[-1] for n, s in record.metrics.items() if n.startswith(kept)},
        "config": run.config,
    }


def final_loss(result: dict[str, Any], sources: Sequence[str]) -> float:
    """Mean over sources of the last held-out loss, nats per token."""
    return sum(result["curves"][source][str(result["steps"])] for source in sources) / len(sources)


def tuned(experiment: Experiment, budget: Budget, shop: Workshop) -> dict[str, float]:
    """Arm -> its learning rate, the best of the grid on the tuning seed; arms whose grid is finished."""
    rates = {}
    for arm in budget.arms:
        made = [shop.result(run) for run in tuning_runs(experiment, budget, arm)]
        losses = {r["lr"]: final_loss(r, experiment.measure) for r in made if r is not None}
        if len(losses) == len(made):
            rates[arm] = min(losses, key=losses.__getitem__)
    return rates


def train_all(experiment: Experiment, budget: Budget, shop: Workshop) -> None:
    """Tune, then train every arm, seed and length."""

    def wanted() -> list[Run]:
        tuning = [run for arm in budget.arms for run in tuning_runs(experiment, budget, arm)]
        return [*tuning, *final_runs(experiment, budget, tuned(experiment, budget, shop))]

    shop.finish(wanted)
