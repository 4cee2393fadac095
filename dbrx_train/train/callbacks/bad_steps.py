"""Skips the steps that would spoil the weights, and has the run rolled back when they do not end."""

from __future__ import annotations

import math
from collections import defaultdict
from pathlib import Path
from typing import Any, NoReturn

import torch
from composer import Logger, State
from composer.utils import dist
from torch import Tensor
from tqdm import tqdm

from dbrx_train.config import BadStepsConfig
from dbrx_train.errors import Stopped
from dbrx_train.jsonl import EVENTS
from dbrx_train.parallel.gather import gather_objects
from dbrx_train.resilience.spike_detector import SpikeDetector
from dbrx_train.train.step_outcome import StepOutcome
from dbrx_train.train.tracking import events
from dbrx_train.train.train_state import StatefulCallback

Samples = dict[str, list[int]]


class RollBack(Exception):
    """Bad steps do not end; the run should go on from a checkpoint of ``before`` steps at most."""

    def __init__(self, before: int) -> None:
        super().__init__(f"bad steps since step {before}")
        self.before = before


class BadSteps(StatefulCallback):
    """Judges every step by its loss and gradient norm over all ranks, before the optimizer takes it.

    Of a bad one the gradients are dropped, so that the optimizer has nothing to do: no parameter, moment or
    step count changes. In time and data the run goes on. Bad steps are logged as ``bad_steps/skipped``, their
    number so far, and recorded with their samples as events in ``folder``.

    To be called ahead of what saves checkpoints.
    """

    key = "bad_steps"

    def __init__(self, config: BadStepsConfig, folder: Path) -> None:
        self.config, self.folder = config, folder
        self.judge = SpikeDetector(config.window, config.warmup, config.mad_threshold)
        self.losses: list[Tensor] = []
        """Each microbatch's share of this rank's loss."""
        self.samples: list[tuple[Tensor, Tensor]] = []
        """Sources and numbers of each microbatch's samples."""
        self.cause = ""
        """Of the latest bad step."""

    def state_dict(self) -> dict[str, Any]:
        return self.judge.state_dict()

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.judge.load_state_dict(state)

    def batch_start(self, state: State, logger: Logger) -> None:
        self.losses, self.samples = [], []

    def after_backward(self, state: State, logger: Logger) -> None:
        # By now Composer has scaled it, in place, by the microbatch's weight in the batch.
        self.losses.append(state.loss["total"].detach())
        self.samples.append((state.batch["source"], state.batch["sample_id"]))

    def judge_step(self, state: State, logger: Logger, norm: Tensor) -> StepOutcome:
        """Drop the gradients, of this ``norm``, if the step is bad."""
        loss = torch.stack(self.losses).sum()
        found = torch.stack((loss.double(), norm.to(loss.device).double()))
        dist.all_reduce(found)
        values = (found / dist.get_world_size()).tolist()  # the one time that the host waits
        step = state.timestamp.batch.value
        cause = self.judge.judge(step, dict(zip(("loss", "gradient norm"), values, strict=True)))
        if cause is not None:
            self.cause = cause
            for optimizer in state.optimizers:
                optimizer.zero_grad(set_to_none=True)
            self._record(state, *values)
            logger.log_metrics({"bad_steps/skipped": self.judge.skipped})
        return StepOutcome(step, norm=values[1], loss=values[0], cause=cause)

    def _record(self, state: State, loss: float, norm: float) -> None:
        step, (every, suspect) = state.timestamp.batch.value, self._samples(state)
        suspects = {"not_finite": suspect} if suspect else {}
        events.record(
            self.folder,
            "bad_step",
            step=step,
            tokens=state.timestamp.token.value,
            cause=self.cause,
            loss=loss,
            norm=norm,
            row=self.judge.row,
            samples=every,
            **suspects,
        )
        if dist.get_global_rank() == 0:
            where = self.folder / EVENTS
            tqdm.write(f"step {step} skipped: {self.cause}; the samples of its batch are in {where}")

    def _samples(self, state: State) -> tuple[Samples, Samples]:
        """By source, the samples of the global batch, and those of microbatches whose loss is not finite."""
        shares = torch.stack(self.losses).tolist()
        mine = [
            (math.isfinite(share), sources.tolist(), numbers.tolist())
            for share, (sources, numbers) in zip(shares, self.samples, strict=True)
        ]
        names = state.train_dataloader.dataset.schedule.sources
        every, suspect = defaultdict[str, list[int]](list), defaultdict[str, list[int]](list)
        for microbatches in gather_objects(mine):
            for finite, sources, numbers in microbatches:
                for source, number in zip(sources, numbers, strict=True):
                    every[names[source]].append(number)
                    if not finite:
                        suspect[names[source]].append(number)
        return every, suspect

    def batch_checkpoint(self, state: State, logger: Logger) -> None:
        """Raises RollBack where bad steps do not end, and Stopped where roll-backs did not help."""
        after, row = self.config.rollback_after, self.judge.row
        if after is None or row < after:
            return
        ends = state.timestamp >= state.max_duration
        if self.config.skip_data and ends:
            return  # no data is left to go on with, and the weights are those from before
        if self.judge.rollbacks >= self.config.max_rollbacks:
            self.give_up(state, f"{self.judge.rollbacks} roll-backs did not help")
        raise RollBack(state.timestamp.batch.value - row)

    def give_up(self, state: State, why: str) -> NoReturn:
        """Raises Stopped, which says what there is to see."""
        step, row = state.timestamp.batch.value, self.judge.row
        events.record(
            self.folder, "gave_up", step=step, tokens=state.timestamp.token.value, row=row, cause=why
        )
        raise Stopped(
            f"stopped at step {step}, after {row} bad steps in a row (in the last, {self.cause}): {why}. "
            f"Their samples are in {self.folder / EVENTS}; `dbrx-train data inspect` shows them"
        )
