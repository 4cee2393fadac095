"""A sharded model under Composer's Trainer: all that it takes is here.

Composer's own FSDP2 path replaces the mesh by one of a single axis, so there could be neither replicas nor
spread experts. But the Trainer leaves a model alone of which any module is sharded already. So we shard it
first (``plan/rank.py``), say which backward pass is a step's last (``ReduceOnce``), and make sure that the
Trainer did leave it alone (``check_left_alone``). Clipping is ours too (``callbacks/gradients.py``), for
gradients lie on several meshes, and so are checkpoints (``callbacks/checkpoints.py``).
"""

from __future__ import annotations

from collections.abc import Callable

from composer import Callback, Logger, State, Trainer
from torch.distributed.fsdp import FSDPModule

from dbrx_train.data.stream.loader import Batch
from dbrx_train.train.composer_model import ComposerDbrx
from dbrx_train.train.train_state import model_of

__all__ = ["ReduceOnce", "check_left_alone"]


class ReduceOnce(Callback):  # type: ignore[misc]
    """Lets replicas reduce their gradients after a step's last microbatch alone.

    ``split``: cuts a rank's batch into microbatches of so many samples, as the Trainer will.
    """

    def __init__(self, split: Callable[[Batch, int], list[Batch]]) -> None:
        self.split, self.left = split, 0

    def batch_start(self, state: State, logger: Logger) -> None:
        self.left = len(self.split(state.batch, state.device_train_microbatch_size))

    def before_forward(self, state: State, logger: Logger) -> None:
        self.left -= 1
        model = model_of(state)
        if isinstance(model, FSDPModule):
            model.set_requires_all_reduce(self.left == 0)


def check_left_alone(trainer: Trainer, model: ComposerDbrx) -> None:
    """Raise RuntimeError if the Trainer wrapped a sharded model after all, as another version might."""
    sharded = isinstance(model.model, FSDPModule)
    if sharded and (trainer.state.model is not model or not trainer.state.fsdp_enabled):
        raise RuntimeError("this version of Composer wraps a model that is sharded already; use 0.32")
