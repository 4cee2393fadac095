"""Faults in the steps of real runs, and what they did to the weights; a program for two ranks too.

torchrun --nproc-per-node 2 bad_step_ranks.py CONFIG JOBS, where JOBS is a JSON list of
{"name", "faults", "options": overrides, "favourite"}. Rank 0 prints a JSON list of {"steps", "alike", "same
weights"}: whether each step changed what it holds, whether all ranks found the same of theirs, and whether
they hold the same at the end.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from composer import Callback, Logger, State, Trainer
from composer.utils import dist
from parallel_ranks import tell
from torch.distributed.tensor import DTensor

from dbrx_train.config import RunConfig, load
from dbrx_train.train import environment, run
from dbrx_train.train.train_state import model_of, tensors

Fault = dict[str, Any]
"""{"step", "in": loss or gradient, "factor", and where: "rank", "microbatch", "times"; by default everywhere,
and whenever the step is taken}."""


class Faults(Callback):  # type: ignore[misc]
    """Multiplies losses and gradients as asked, and notes what each step did."""

    def __init__(self, faults: Sequence[Fault], favourite: int | None = None) -> None:
        self.faults = [{"times": 1000, **fault} for fault in faults]
        self.favourite = favourite
        self.microbatch = 0
        self.before: dict[str, torch.Tensor] = {}
        self.after: dict[str, torch.Tensor] = {}
        self.steps: list[tuple[int, bool]] = []
        """Each step taken, and whether anything changed."""
        self.samples: dict[int, list[list[int]]] = {}
        self.began_with: list[dict[str, torch.Tensor]] = []
        """What each ``fit`` began with."""
        self.rates: dict[int, float] = {}

    def fit_start(self, state: State, logger: Logger) -> None:
        self.began_with.append(self._held(state))
        if self.favourite is not None:
            for block in model_of(state).transformer.blocks:
                block.ffn.router.expert_bias[self.favourite] = 1e3

    def _held(self, state: State) -> dict[str, torch.Tensor]:
        if not state.optimizers[0].state:  # to look would make it
            return {name: p.detach().clone() for name, p in model_of(state).state_dict().items()}
        local = ((n, t.to_local() if isinstance(t, DTensor) else t) for n, t in tensors(state).items())
        return {name: t.detach().clone() for name, t in local if not name.startswith("random.")}

    def batch_start(self, state: State, logger: Logger) -> None:
        self.microbatch, self.before = 0, self._held(state)
        self.rates[state.timestamp.batch.value] = state.optimizers[0].param_groups[0]["lr"]
        pairs = zip(state.batch["source"].tolist(), state.batch["sample_id"].tolist(), strict=True)
        self.samples[state.timestamp.batch.value] = [list(pair) for pair in pairs]

    def after_loss(self, state: State, logger: Logger) -> None:
        for fault in self._due(state, "loss"):
            state.loss["total"] = state.loss["total"] * float(fault["factor"])

    def after_backward(self, state: State, logger: Logger) -> None:
        for fault in self._due(state, "gradient"):
            grad = next((p.grad for p in state.model.parameters() if p.grad is not None), None)
            if grad is not None:  # replicas have none before the last microbatch
                local = grad.to_local() if isinstance(grad, DTensor) else grad
                local.view(-1)[0] = float(fault["factor"])
        self.microbatch += 1

    def _due(self, state: State, where: str) -> Iterator[Fault]:
        here = {
            "in": where,
            "step": state.timestamp.batch.value,
            "rank": dist.get_global_rank(),
            "microbatch": self.microbatch,
        }
        for fault in self.faults:
            if fault["times"] and all(fault.get(key, value) == value for key, value in here.items()):
                yield fault

    def batch_end(self, state: State, logger: Logger) -> None:
        step, self.after = state.timestamp.batch.value - 1, self._held(state)
        same = self.after.keys() == self.before.keys() and all(
            torch.equal(tensor, self.before[name]) for name, tensor in self.after.items()
        )
        self.steps.append((step, not same))
        for fault in self.faults:
            fault["times"] -= fault["step"] == step


@contextmanager
def faulty(*faults: Fault, favourite: int | None = None) -> Iterator[Faults]:
    """Within, whatever run is started has these faults; ``favourite``: an expert that gets every token."""
    noted, build = Faults(faults, favourite), run.build_trainer

    def with_faults(*arguments: Any) -> Trainer:
        trainer = build(*arguments)
        trainer.state.callbacks.append(noted)
        return trainer

    run.build_trainer = with_faults
    try:
        yield noted
    finally:
        run.build_trainer = build


def events(config: RunConfig) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (Path(config.folder) / "events.jsonl").read_text().splitlines()]


def job(path: str, name: str, faults: list[Fault], options: list[str], favourite: int | None) -> Any:
    config = load(path, [f"run_name={name}", f"folder={Path(path).parent}/{name}", *options])
    with faulty(*faults, favourite=favourite) as noted:
        run.run(config)
    steps, ends = (dist.all_gather_object(mine) for mine in (noted.steps, noted.after))
    same = all(torch.equal(tensor, noted.after[name]) for end in ends for name, tensor in end.items())
    return {"steps": noted.steps, "alike": all(each == noted.steps for each in steps), "same weights": same}


if __name__ == "__main__":
    environment.join_ranks("cpu", load(sys.argv[1]).parallelism.timeout)
    tell([job(sys.argv[1], **each) for each in json.loads(sys.argv[2])])
