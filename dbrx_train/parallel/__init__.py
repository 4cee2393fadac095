"""How a model is spread over many ranks: the mesh, and sharding over it. torch.distributed alone."""

from dbrx_train.parallel.clipping import clip_grad_norm
from dbrx_train.parallel.mesh import MeshShape
from dbrx_train.parallel.sharding import parallelize

__all__ = ["MeshShape", "clip_grad_norm", "parallelize"]
