"""Training that goes back to a checkpoint where bad steps do not end."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

from composer import Trainer
from composer.callbacks import SpeedMonitor
from composer.utils import dist
from tqdm import tqdm

from dbrx_train.checkpoint.folder import Checkpoint
from dbrx_train.train.callbacks.bad_steps import BadSteps, RollBack
from dbrx_train.train.callbacks.checkpoints import Checkpoints
from dbrx_train.train.callbacks.goodput import Wall
from dbrx_train.train.tracking import events
from dbrx_train.train.train_state import callback_of, metadata

__all__ = ["fit"]


def fit(
    trainer: Trainer,
    folder: Path,
    newest: Callable[[float], Checkpoint | None],
    resume: Callable[[Checkpoint], None],
) -> None:
    """Train to the end, and again from a checkpoint each time that ``BadSteps`` asks for it.

    Args:
        folder: the run's, for its events.
        newest: finds the newest whole checkpoint of so many steps at most, the same on every rank.
        resume: puts the Trainer where a checkpoint was saved.

    Raises:
        Stopped: there is no checkpoint to go back to, or going back did not help.
    """
    while (before := _train(trainer)) is not None:
        callback_of(trainer.state, Checkpoints).finish()
        # Where none is left from before the bad steps, one amid them has the weights from before them.
        checkpoint = newest(before) or newest(math.inf)
        guard = callback_of(trainer.state, BadSteps)
        if checkpoint is None:
            guard.give_up(trainer.state, "there is no checkpoint to go back to yet")
        _go_back(trainer, guard, folder, checkpoint, resume)


def _train(trainer: Trainer) -> int | None:
    """The step to go back before; None at the run's end."""
    try:
        trainer.fit()
    except RollBack as found:
        return found.before
    return None


def _go_back(
    trainer: Trainer,
    guard: BadSteps,
    folder: Path,
    checkpoint: Checkpoint,
    resume: Callable[[Checkpoint], None],
) -> None:
    now, pass_over, row = metadata(trainer.state), guard.config.pass_over, guard.judge.row
    step, tokens = now["time"]["batch"], now["time"]["token"]
    kept = None if pass_over else checkpoint.facts.get(guard.key)
    judge = guard.judge.roll_back(step, kept)
    if pass_over:  # as if the checkpoint's weights had been saved now
        back = now
    else:
        spent = {key: value for key, value in now["time"].items() if key.endswith("_wct")}
        back = {"time": checkpoint.facts["time"] | spent}
    resume(replace(checkpoint, facts=checkpoint.facts | back | {guard.key: judge}))
    if pass_over:
        callback_of(trainer.state, Wall).lose(checkpoint.step)
    for callback in trainer.state.callbacks:
        if isinstance(callback, SpeedMonitor):  # measures over its latest steps, as if they were in a row
            for name in ("samples", "tokens", "wct", "flops"):
                getattr(callback, f"history_{name}").clear()
    if dist.get_global_rank() == 0:
        on = f"; data goes on at step {step}" if pass_over else ""
        tqdm.write(f"{row} bad steps in a row: back from step {step} to {checkpoint.folder}{on}")
    events.record(
        folder,
        "rollback",
        step=step,
        tokens=tokens,
        row=row,
        to_step=checkpoint.step,
        to=str(checkpoint.folder),
        passed_over=step - checkpoint.step if pass_over else 0,
        rollbacks=judge["rollbacks"],
    )
