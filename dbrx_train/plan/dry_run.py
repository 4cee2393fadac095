"""Dry run: a training step of one rank of many, on fake tensors, for its memory and traffic.

The real model, sharding, loss, backward pass, clipping and optimizer run under FakeTensorMode on a fake
process group: tensors have shapes and no contents, collectives do nothing. What a rank allocates and sends is
then observed, not computed from a formula. Shape suffixes as in ``parallel/expert_parallel.py``.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import astuple, dataclass
from datetime import timedelta
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed.fsdp import FSDPModule

from dbrx_train.config import ConfigError, OptimizerConfig, RunConfig
from dbrx_train.model import lora
from dbrx_train.model.decoder import Dbrx
from dbrx_train.parallel import MeshShape, clip_grad_norm
from dbrx_train.parallel.expert_parallel import TokenDispatcher
from dbrx_train.parallel.mesh import Meshes
from dbrx_train.plan.estimates import run_memory
from dbrx_train.plan.memory import Memory
from dbrx_train.plan.memory_tracker import Collectives, MemoryTracker, Peak
from dbrx_train.plan.rank import build_model, is_sharded, param_dtype
from dbrx_train.plan.world import Microbatch, check_world, largest_microbatch, mesh_shape

__all__ = ["BuildOptimizer", "DryRun", "StepMemory", "dry_run", "estimated", "worst_skew"]

BuildOptimizer = Callable[[Dbrx, OptimizerConfig], torch.optim.Optimizer]


@dataclass(frozen=True)
class StepMemory:
    """Memory of a step at one load of the experts, in bytes."""

    skew: float
    """Tokens that this rank's experts get, over an even share."""
    moments: dict[str, Peak]
    """Peaks of the forward pass, the head in both directions, the blocks' backward pass and the optimizer."""
    reserved: dict[str, int]
    """What the caching allocator took from the device until the step's end, by its kind of segments."""

    @property
    def peak_moment(self) -> str:
        return max(self.moments, key=lambda moment: self.moments[moment].allocated)

    @property
    def peak(self) -> Peak:
        return self.moments[self.peak_moment]


@dataclass(frozen=True)
class DryRun:
    """What was observed on rank 0."""

    shape: MeshShape
    microbatch: Microbatch
    steps: tuple[StepMemory, ...]
    """One for each skew, in order."""
    sent: Collectives
    """Bytes that the rank sends in an optimizer step of ``microbatches``, its experts evenly loaded."""
    microbatches: int
    """That a step was observed with: the run's, but no more than two, after which nothing new happens."""
    seconds: float


def worst_skew(shape: MeshShape, num_experts: int, top_k: int) -> float:
    """Most that a rank's experts can get, over an even share: each token visits its experts once each."""
    return shape.expert * min(top_k, num_experts // shape.expert) / top_k


def dry_run(
    config: RunConfig,
    ranks: int,
    build_optimizer: BuildOptimizer,
    skews: Sequence[float] = (1.0, 1.5),
    worst: bool = True,
) -> DryRun:
    """Run training steps of rank 0 of ``ranks``, one at each of the loads ``skews`` and at the ``worst``.

    An unmeasured step comes first, in which the optimizer makes its state. Experts that are not spread have
    no skew: whatever the load, a rank computes all its tokens; then there is one step.

    Raises:
        ConfigError: the run does not fit so many ranks, or is of a kind that has no dry run.
    """
    began = time.monotonic()
    _check(config)
    check_world(config, ranks)
    shape, micro = mesh_shape(config, ranks), largest_microbatch(config, ranks)
    model = config.model
    if shape.expert == 1:
        skews = (1.0,)
    elif worst:
        limit = worst_skew(shape, model.num_experts, model.top_k)
        skews = (*(skew for skew in skews if skew < limit), limit)
    microbatches = min(micro.per_step, 2)
    with _fake_rank(ranks) as fake_mode, ExitStack() as stack:
        stack.enter_context(fake_mode)
        stack.enter_context(_adapters_by_shape())
        rank = _Rank(config, shape, micro, build_optimizer)
        stack.enter_context(rank.tracker.resizing())
        stack.enter_context(rank.tracker)
        rank.step(1, 1.0)
        steps, sent = [], Collectives()
        for skew in skews:
            rank.tracker.begin()
            rank.step(microbatches, skew)
            tracker = rank.tracker
            reserved = {name: allocator.reserved for name, allocator in tracker.allocators.items()}
            steps.append(StepMemory(skew, tracker.peaks, reserved))
            if skew == 1:
                sent = tracker.collectives
        del rank
    return DryRun(shape, micro, tuple(steps), sent, microbatches, time.monotonic() - began)


def estimated(config: RunConfig, run: DryRun, skew: float) -> Memory:
    """What the closed form says of the same step."""
    return run_memory(config, run.shape, run.microbatch, skew)


def _check(config: RunConfig) -> None:
    for unfit, key in (
        (config.parallelism.cpu_offload, "parallelism.cpu_offload"),
        (config.preferences.beta is not None, "preferences.beta"),
    ):
        if unfit:
            raise ConfigError(f"{key}: is not simulated by a dry run; leave it out there")


@contextmanager
def _fake_rank(ranks: int) -> Iterator[Any]:
    """A FakeTensorMode, on rank 0 of a fake process group; both are private to torch."""
    if dist.is_initialized():
        raise ConfigError("a dry run needs a process that no process group has been made in")
    try:
        import torch.distributed._tools.fake_collectives  # what collectives do to fake tensors
        from torch._subclasses.fake_tensor import FakeTensorMode
        from torch.testing._internal.distributed.fake_pg import FakeStore
    except ImportError as error:
        raise ConfigError(
            f"torch {torch.__version__} has no dry run ({error}); it is known to work with 2.7"
        ) from None
    dist.init_process_group("fake", store=FakeStore(), rank=0, world_size=ranks)
    try:
        yield FakeTensorMode()
    finally:
        dist.destroy_process_group()


@contextmanager
def _adapters_by_shape() -> Iterator[None]:
    """Products beside adapters of experts, as of one: fake counts cannot be read, and shapes are the same."""
    products = lora.segment_mm
    vars(lora)["segment_mm"] = lambda x_NK, w_EKM, _: x_NK @ w_EKM[0]
    try:
        yield
    finally:
        vars(lora)["segment_mm"] = products


@dataclass(frozen=True)
class _RealMesh(MeshShape):
    """A mesh shape whose DeviceMeshes are of real tensors: they compute with their ranks."""

    def build(self, device_type: str, timeout: timedelta | None = None) -> Meshes:
        from torch._subclasses.fake_tensor import unset_fake_temporarily

        with unset_fake_temporarily():
            return super().build(device_type, timeout)


class _AssumedLoad(TokenDispatcher):
    """Rows as many as a stated skew says, since fake counts cannot be read."""

    skew = 1.0

    def splits(self, sent_Re: Tensor, got_Re: Tensor) -> tuple[list[int], list[int]]:
        rows = self.rows_sent
        here = round(rows * self.skew / self.ranks)
        rest, more = divmod(rows - here, self.ranks - 1)
        leaving = [here, *(rest + (i < more) for i in range(self.ranks - 1))]
        return leaving, [here] * self.ranks

    def __call__(
        self, experts: Any, x_ND: Tensor, tokens_per_expert: Tensor, weight_N: Tensor | None = None
    ) -> Tensor:
        self.rows_sent = x_ND.shape[0]
        return super().__call__(experts, x_ND, tokens_per_expert, weight_N)


class _Rank:
    """The rank's model and optimizer, and the step that they take."""

    def __init__(
        self, config: RunConfig, shape: MeshShape, micro: Microbatch, build_optimizer: BuildOptimizer
    ) -> None:
        self.config, self.micro = config, micro
        self.tracker = MemoryTracker()
        real = _RealMesh(*astuple(shape))
        self.model = build_model(config, "cpu", real, draw=False)
        if not is_sharded(config, shape.replicate * shape.shard):
            self.model.to_empty(device="cpu")
        self.dispatchers = []
        for block in self.model.transformer.blocks:
            dispatcher = block.ffn.experts.token_dispatcher
            if dispatcher is not None:
                assert isinstance(dispatcher, TokenDispatcher)
                assumed = _AssumedLoad(dispatcher.group)
                block.ffn.experts.token_dispatcher = assumed
                self.dispatchers.append(assumed)
        # As on a GPU, where no mask is made at any length.
        vars(self.model.transformer)["separate"] = lambda *_: [[micro.seq_len]] * micro.samples
        self.optimizer = build_optimizer(self.model, config.optimization.optimizer)
        self._watch_moments()
        self.tracker.tag(self.model.parameters(), "parameters")
        self.tracker.tag(self.model.buffers(), "parameters")

    def _watch_moments(self) -> None:
        def enter(moment: str, kind: str) -> Callable[..., None]:
            def set_moment(*_: Any) -> None:
                self.tracker.moment, self.tracker.default_kind = moment, kind

            return set_moment

        def after_norm(module: Any, args: Any, hidden: Tensor) -> None:
            # Its gradient is there when the head's backward pass is over.
            hidden.register_hook(enter("blocks backward", "backward"))  # type: ignore[no-untyped-call]

        self.model.transformer.norm_f.register_forward_hook(after_norm)
        self.model.lm_head.register_forward_pre_hook(enter("head forward", "head"))
        self._enter = enter

    def step(self, microbatches: int, skew: float) -> None:
        for dispatcher in self.dispatchers:
            dispatcher.skew = skew
        if self.model.batch_load is not None:
            self.model.batch_load.begin()  # type: ignore[attr-defined]
        for i in range(microbatches):
            if isinstance(self.model, FSDPModule):
                self.model.set_requires_all_reduce(i + 1 == microbatches)
            self._microbatch()
        self._enter("optimizer", "optimizer's work")()
        sent = self.tracker.collectives
        self.tracker.collectives = Collectives()  # norms are not counted
        if self.config.optimization.clip_grad_norm is not None:
            clip_grad_norm(self.model.parameters(), self.config.optimization.clip_grad_norm)
        with self.tracker.scalars(1):  # how many steps it has taken
            self.optimizer.step()
        self.tracker.collectives = sent
        states = self.optimizer.state.values()
        self.tracker.tag(
            (t for state in states for t in state.values() if isinstance(t, Tensor)), "optimizer state"
        )
        self.optimizer.zero_grad()

    def _microbatch(self) -> None:
        self._enter("forward", "activations")()
        shape = self.micro.samples, self.micro.seq_len
        ids = torch.zeros(shape, dtype=torch.int64)
        dtype = param_dtype(self.config)
        with torch.autocast("cpu", dtype or torch.bfloat16, enabled=dtype is not None):
            output = self.model(ids, labels=ids, document_ids=torch.zeros_like(ids))
        self._enter("head backward", "head")()
        output.loss.backward()
