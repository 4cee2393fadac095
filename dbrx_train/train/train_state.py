"""The train state: what a Trainer is and has done, what of it a checkpoint holds, and how it is put back.

Composer's own loading knows one file or its own sharding; ours takes any mesh to any other. The Trainer needs
its time and its data set's position, and nothing else of Composer's state: seed and durations come from the
configuration, and the learning rate from the time.
"""

from __future__ import annotations

import datetime
import io
import random
from typing import Any, ClassVar, TypeVar

import numpy as np
import torch
from composer import Callback, Logger, State, Trainer
from composer.utils import dist
from torch import Tensor
from torch.distributed import get_process_group_ranks

from dbrx_train.checkpoint.folder import Checkpoint
from dbrx_train.checkpoint.replicas import read_once, replica_group
from dbrx_train.checkpoint.tensors import Reader, model_tensors, optimizer_tensors
from dbrx_train.model.decoder import Dbrx
from dbrx_train.train.step_outcome import StepOutcome

__all__ = [
    "StatefulCallback",
    "TrainState",
    "callback_of",
    "metadata",
    "model_of",
    "outcome_of",
    "restore",
    "tensors",
]


_Kind = TypeVar("_Kind", bound=Callback)


class StatefulCallback(Callback):  # type: ignore[misc]
    """A callback whose ``state_dict``, of plain values, is kept in every checkpoint under ``key``."""

    key: ClassVar[str]


def callback_of(state: State, kind: type[_Kind]) -> _Kind:
    """The one callback of a kind that a run has."""
    (found,) = (each for each in state.callbacks if isinstance(each, kind))
    return found


def model_of(state: State) -> Dbrx:
    """The model inside Composer's wrappers."""
    composed = state.model.module if state.is_model_ddp else state.model
    model: Dbrx = composed.model
    return model


class TrainState(Callback):  # type: ignore[misc]
    """What this process knows of the run beside Composer's State. Comes before the callbacks that ask it."""

    def __init__(self) -> None:
        self.outcome: StepOutcome | None = None
        """Of the step that is under way, once it has been judged, until the next one begins."""
        self.rng_state: Tensor | None = None
        """This rank's random states to go on with, if the run is resumed."""

    def batch_start(self, state: State, logger: Logger) -> None:
        self.outcome = None
        # Not earlier: making the loader's iterator draws a number.
        if self.rng_state is not None:
            _set_random_state(self.rng_state)
            self.rng_state = None

    def judged(self, outcome: StepOutcome) -> None:
        """Written once a step, by whoever judges it, before the optimizer is asked."""
        assert self.outcome is None, "a step is judged once"
        self.outcome = outcome


def outcome_of(state: State) -> StepOutcome:
    """What became of the step that has just ended."""
    outcome = callback_of(state, TrainState).outcome
    assert outcome is not None, "no step has been judged"
    return outcome


def tensors(state: State) -> dict[str, Tensor]:
    """Model, optimizer and this rank's random states; the first two are not copied."""
    model = model_of(state)
    return (
        model_tensors(model)
        | optimizer_tensors(model, state.optimizers[0])
        | {f"random.{dist.get_global_rank()}": _random_state()}
    )


def metadata(state: State) -> dict[str, Any]:
    """Time, position in the data and what callbacks keep, as plain values."""
    times = state.timestamp.state_dict()
    return {each.key: each.state_dict() for each in _stateful(state)} | {
        "time": {k: v.total_seconds() if isinstance(v, datetime.timedelta) else v for k, v in times.items()},
        "data": state.train_dataloader.dataset.state_dict(state.timestamp.sample_in_epoch.value, True),
    }


def _stateful(state: State) -> list[StatefulCallback]:
    return [callback for callback in state.callbacks if isinstance(callback, StatefulCallback)]


def restore(trainer: Trainer, checkpoint: Checkpoint, reader: Reader) -> None:
    """Put a Trainer where the checkpoint was saved; random states only if as many ranks saved as read.

    Raises:
        ValueError: tensors are missing or do not fit.
    """
    state, model = trainer.state, model_of(trainer.state)
    found = model_tensors(model) | optimizer_tensors(model, state.optimizers[0])
    group = replica_group(found.values())
    ranks = [dist.get_global_rank()] if group is None else get_process_group_ranks(group)
    names = [f"random.{rank}" for rank in ranks if checkpoint.metadata["ranks"] == dist.get_world_size()]
    drawn = {name: torch.empty(reader.shapes[name][0], dtype=torch.uint8) for name in names}
    read_once(reader, found | drawn, group)
    times = checkpoint.metadata["time"]
    spans = {key: datetime.timedelta(seconds=value) for key, value in times.items() if key.endswith("_wct")}
    state.load_state_dict(
        {"timestamp": {"Timestamp": times | spans}, "dataset_state": {"train": checkpoint.metadata["data"]}},
        trainer.logger,
    )
    for callback in _stateful(state):
        if callback.key in checkpoint.metadata:  # not in older ones
            callback.load_state_dict(checkpoint.metadata[callback.key])
    callback_of(state, TrainState).rng_state = drawn.get(f"random.{dist.get_global_rank()}")


def _random_state() -> Tensor:
    """The states of all generators of this rank, as bytes."""
    kind, numbers, *rest = np.random.get_state(legacy=True)
    states = {
        "python": random.getstate(),
        "numpy": (kind, torch.from_numpy(np.array(numbers)), *rest),
        "torch": torch.get_rng_state(),
        "cuda": torch.cuda.get_rng_state() if torch.cuda.is_available() else None,
    }
    torch.save(states, file := io.BytesIO())
    return torch.frombuffer(bytearray(file.getvalue()), dtype=torch.uint8)


def _set_random_state(drawn: Tensor) -> None:
    """Undo ``_random_state``."""
    states = torch.load(io.BytesIO(drawn.numpy().tobytes()), weights_only=True)
    kind, numbers, *rest = states["numpy"]
    random.setstate(states["python"])
    np.random.set_state((kind, numbers.numpy(), *rest))
    torch.set_rng_state(states["torch"])
    if states["cuda"] is not None and torch.cuda.is_available():
        torch.cuda.set_rng_state(states["cuda"])
