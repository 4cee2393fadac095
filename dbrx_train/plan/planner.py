"""The plan of a run: what it holds, sends, takes and costs on given GPUs, in closed form."""

from __future__ import annotations

from dataclasses import dataclass, replace

from dbrx_train.config import ConfigError, RunConfig
from dbrx_train.model.config import LONGEST_MASK
from dbrx_train.parallel.mesh import MeshShape
from dbrx_train.plan import hardware, step_time
from dbrx_train.plan.adapters import trained
from dbrx_train.plan.collectives import KINDS, Collective
from dbrx_train.plan.cost import Cost, cost
from dbrx_train.plan.estimates import param_type, run_collectives, run_memory
from dbrx_train.plan.hardware import GPU
from dbrx_train.plan.memory import GATHERED, STATES, Memory
from dbrx_train.plan.step_time import RUNTIME, Architecture, StepTime
from dbrx_train.plan.world import Microbatch, check_world, largest_microbatch, mesh_shape, microbatch
from dbrx_train.schedule import Stage

__all__ = ["DENSE_ERROR", "MOE_ERROR", "Held", "Plan", "count", "held", "kind", "plan"]

DENSE_ERROR, MOE_ERROR = 0.15, 0.25
"""Of a predicted step time. Nine in ten published dense runs are within 7 % by constants fitted to other
models, within 17 % by those fitted to another table; five of mixtures are within 20 % (docs/planning.md)."""


@dataclass(frozen=True)
class Held:
    """Bytes that a rank holds at the largest of the run's stages."""

    memory: Memory
    on_host: int
    """Of that, what is offloaded."""

    @property
    def total(self) -> int:
        """What the caching allocator takes of the GPU's memory."""
        return self.memory.reserved - self.on_host


@dataclass(frozen=True)
class Plan:
    """What a run needs on ``gpus`` GPUs, and how long it takes."""

    config: RunConfig
    gpu: GPU
    gpus: int
    shape: MeshShape
    stage: Stage
    """The one with most of the run's tokens; figures of a step are its."""
    microbatch: Microbatch
    held: Held
    sent: list[Collective]
    """In a step."""
    step: StepTime
    tokens_per_second: float
    """Of all GPUs."""
    cost: Cost

    @property
    def room(self) -> float:
        """Bytes of the GPU's memory that tensors can have."""
        return self.gpu.memory - RUNTIME

    @property
    def fits(self) -> bool:
        return self.held.total <= self.room

    @property
    def network(self) -> float | None:
        """Bytes/s of an adapter that is not the GPU's usual one."""
        return _network(self.config)

    @property
    def error(self) -> float:
        """Share by which the step time may be off."""
        return DENSE_ERROR if self.config.model.is_dense else MOE_ERROR

    def mfu(self, causal: bool) -> float:
        """Model FLOPs over the GPUs' peak; ``causal`` counts the keys that a query meets."""
        flops = self.config.model.flops_per_token(self.stage.seq_len, causal)
        if self.config.lora.rank is not None:
            flops -= 2 * self.config.model.num_active_params_non_embedding
        return flops * self.tokens_per_second / self.gpus / self.gpu.peak

    @property
    def limit(self) -> str:
        """What takes most of the step."""
        of_links = dict.fromkeys(("NVLink", "network"), 0.0)
        for each in self.sent:
            way = each.way(self.gpu, self.config.plan.machine, self.network)
            of_links[way.slower] += way.seconds
        times = self.step.compute
        parts = {
            "matrix products": times.dense_products + times.expert_products + times.head,
            "attention": times.attention,
            "memory bandwidth": times.elementwise,
        }
        parts = {name: seconds * self.step.accumulated for name, seconds in parts.items()}
        parts |= of_links | {"optimizer": self.step.optimizer}
        return max(parts, key=lambda name: parts[name])


def kind(config: RunConfig) -> GPU:
    """The GPU that the plan is for, with its peak at the run's precision.

    Raises:
        ConfigError: it is not known.
    """
    try:
        card = hardware.gpu(config.plan.gpu)
    except ValueError as error:
        raise ConfigError(f"plan.gpu: {error}") from None
    return replace(card, peak=card.peak_float32) if config.precision == "fp32" else card


def count(config: RunConfig) -> int:
    """How many GPUs the plan is for: by default the mesh's, one group, or what a machine has of use."""
    given = config.parallelism
    replicate = given.replicate if isinstance(given.replicate, int) else 1
    if config.plan.gpus is not None:
        return config.plan.gpus
    if isinstance(given.shard, int):
        return replicate * given.shard
    batches = [stage.global_batch_size for stage in config.clock.stages]
    sizes = range(replicate * given.expert, config.plan.machine + 1, replicate * given.expert)
    return max((n for n in sizes if not any(batch % n for batch in batches)), default=replicate)


def held(config: RunConfig, ranks: int) -> Held:
    """Bytes of a rank at the largest microbatch of all stages, experts loaded as ``plan.imbalance`` says."""
    micro, given = largest_microbatch(config, ranks), config.parallelism
    shape, offloaded, dtype = mesh_shape(config, ranks), given.cpu_offload, param_type(config)
    alone, frozen = ranks == 1 and not offloaded, config.lora.rank is not None
    # Nothing is gathered then, but autograd keeps what each matrix was cast to, as if it were not freed.
    casts = alone and dtype is not None and not frozen
    found = run_memory(config, shape, micro, config.plan.imbalance, keeps_gathered=casts)
    if alone:
        none = {kind: 0 for kind in GATHERED if not (casts and kind == "gathered")}
        found = Memory({moment: kinds | none for moment, kinds in found.moments.items()})
    return Held(found, sum(found.peak[kind] for kind in STATES) if offloaded else 0)


def plan(config: RunConfig, gpus: int | None = None) -> Plan:
    """The plan of ``config`` on ``gpus`` GPUs; by default on those of its section ``plan``.

    Raises:
        ConfigError: its GPU is not known, or the run does not divide over so many.
    """
    card, gpus = kind(config), gpus or count(config)
    check_world(config, gpus)
    shape, holds = mesh_shape(config, gpus), held(config, gpus)
    clock = config.clock
    ends = [*(stage.batch for stage in clock.stages[1:]), clock.total_batches]
    seconds, tokens, main = 0.0, -1, None
    for stage, end in zip(clock.stages, ends, strict=True):
        steps = max(0, min(end, clock.total_batches) - stage.batch)
        sent, step = _step(config, card, shape, stage, holds.total)
        seconds += steps * step.total
        if steps * stage.tokens_per_batch > tokens:
            tokens, main = steps * stage.tokens_per_batch, (stage, sent, step)
    assert main is not None
    stage, sent, step = main
    speed = stage.tokens_per_batch / step.total
    spent = cost(config, card, gpus, shard=shape.shard, seconds=seconds, tokens_per_second=speed)
    batch = microbatch(config, stage, gpus)
    return Plan(config, card, gpus, shape, stage, batch, holds, sent, step, speed, spent)


def _step(
    config: RunConfig, gpu: GPU, shape: MeshShape, stage: Stage, holds: int
) -> tuple[list[Collective], StepTime]:
    ranks = shape.replicate * shape.shard
    batch, given, frozen = microbatch(config, stage, ranks), config.plan, config.lora.rank is not None
    recomputed = config.parallelism.activation_checkpointing
    sent = run_collectives(config, shape, batch)
    if frozen:
        sent = [each for each in sent if each.kind in ("gathered", "exchanged")]
    seconds = dict.fromkeys(KINDS, 0.0)
    for each in sent:
        seconds[each.kind] += each.way(gpu, given.machine, _network(config)).seconds
    computing = step_time.compute(
        Architecture.of(config.model),
        gpu,
        tokens=batch.tokens,
        seq_len=stage.seq_len,
        activation_checkpointing=recomputed,
        local_experts=config.model.num_experts // shape.expert,
        imbalance=given.imbalance if shape.expert > 1 else 1.0,
        masked=_is_masked(config, stage.seq_len),
        frozen=frozen,
    )
    return sent, StepTime(
        compute=computing,
        accumulated=batch.per_step,
        weights=(seconds["gathered"] + seconds["scattered"]) / batch.per_step,
        tokens=seconds["exchanged"] * given.imbalance / batch.per_step,
        replicas=seconds["reduced"],
        optimizer=step_time.optimizer_seconds(trained(config) / shape.shard, gpu),
        retries=step_time.retries(holds, gpu),
    )


def _is_masked(config: RunConfig, seq_len: int) -> bool:
    """Whether documents are kept apart by a mask: in float32, for which no kernel takes their places."""
    return config.model.mask_documents and seq_len <= LONGEST_MASK and param_type(config) is None


def _network(config: RunConfig) -> float | None:
    """Bytes/s of an adapter."""
    return None if config.plan.network is None else config.plan.network * 1e9 / 8
