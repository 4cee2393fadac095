"""How a model is spread over many ranks: the mesh, and sharding over it. torch.distributed alone."""

from dbrx_train.parallel.activation_checkpointing import checkpoint_activations
from dbrx_train.parallel.batch_load import BatchLoad
from dbrx_train.parallel.clipping import clip_grad_norm
from dbrx_train.parallel.failure import StoppedTogether, end_together
from dbrx_train.parallel.hangs import Progress
from dbrx_train.parallel.mesh import MeshShape
from dbrx_train.parallel.sharding import parallelize

__all__ = [
    "BatchLoad",
    "MeshShape",
    "Progress",
    "StoppedTogether",
    "checkpoint_activations",
    "clip_grad_norm",
    "end_together",
    "parallelize",
]
