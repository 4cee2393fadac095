"""How a model is spread over many ranks: the mesh, and sharding over it. torch.distributed alone."""

from dbrx_train.parallel.activation_checkpointing import checkpoint_activations
from dbrx_train.parallel.fsdp import parallelize
from dbrx_train.parallel.global_batch_load import GlobalBatchLoad
from dbrx_train.parallel.grad_norm import clip_grad_norm
from dbrx_train.parallel.mesh import MeshShape

__all__ = [
    "GlobalBatchLoad",
    "MeshShape",
    "checkpoint_activations",
    "clip_grad_norm",
    "parallelize",
]
