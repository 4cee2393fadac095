"""The run's YAML: its schema as dataclasses, and the one way to read it.

Every key is documented here, once; docs/configuration.md is generated from these fields.
Nothing heavy is imported, so that a wrong file is refused within a fraction of a second.
"""

import dataclasses
import difflib
import re
import warnings
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from math import inf
from operator import attrgetter
from pathlib import Path
from typing import Any

import yaml
from omegaconf import DictConfig, OmegaConf
from omegaconf.errors import OmegaConfBaseException

from dbrx_train.data.mix.schedule import MixSchedule
from dbrx_train.model.config import ACTIVATION_CHECKPOINTING, LORA_TARGETS, DbrxConfig
from dbrx_train.redact import mask_tree
from dbrx_train.schedule import Clock, parse_span


class ConfigError(ValueError):
    """The user's configuration is wrong; the message is one line that names the key."""


def _doc(text: str, default: Any = dataclasses.MISSING) -> Any:
    if callable(default):
        return field(default_factory=default, metadata={"doc": text})
    return field(default=default, metadata={"doc": text})


def _require(condition: bool, message: str) -> None:
    if not condition:
        raise ConfigError(message)


@contextmanager
def naming(prefix: str) -> Iterator[None]:
    """A ValueError of another room, with its key put in front."""
    try:
        yield
    except ValueError as error:
        raise ConfigError(f"{prefix}{error}") from None


def _one_of(key: str, value: str, allowed: Sequence[str]) -> None:
    _require(value in allowed, f"{key}: {value!r} is not one of {', '.join(allowed)}")


@dataclass
class TokenizerConfig:
    name: str = _doc("tiktoken encoding; DBRX's is `cl100k_base`", "cl100k_base")
    vocab_file: str | None = _doc("a `.tiktoken` vocabulary file to read instead of downloading one", None)


@dataclass
class SourceConfig:
    local: str = _doc("folder that `dbrx-train data prepare` wrote, or where to cache `remote`")
    remote: str | None = _doc(
        "the same folder on an object store (any URL that mosaicml-streaming reads)", None
    )
    max_epochs: float | None = _doc("refuse a mix that repeats this source more often than this", None)


@dataclass
class MixPointConfig:
    at: str = _doc("when: `0tok`, `2_000_000tok`, `0.7dur` or `10ba`")
    weights: dict[str, float] = _doc(
        "share of each source; need not sum to 1; a source left out gets 0", dict
    )
    reach: str = _doc("`step`: jump here; `linear`: ramp from the point before", "step")
    seq_len: int | None = _doc(
        "tokens per sample from here on, of sources prepared at that length; a step keeps its tokens", None
    )


@dataclass
class DataConfig:
    sources: dict[str, SourceConfig] = _doc("name -> where its shards are", dict)
    mix: list[MixPointConfig] = _doc("the data mix over the run; default: one point, equal weights", list)
    seq_len: int = _doc(
        "tokens per sample; must be that of the prepared shards (`mix` may change it later)", 2048
    )
    shuffle: bool = _doc("shuffle within and across shards", True)
    shuffle_seed: int = _doc("seed of the shuffle", 9176)
    canonical_nodes: int = _doc("parts that each source is cut into; must divide `global_batch_size`", 1)
    num_workers: int = _doc("DataLoader worker processes per rank", 1)
    predownload: int | None = _doc("samples prepared ahead per worker; default: eight batches", None)
    cache_limit: int | None = _doc("bytes of disk that all sources may keep locally of `remote` data", None)

    def check(self) -> None:
        _require(
            bool(self.sources), "data.sources: name at least one source, such as {web: {local: data/web}}"
        )
        _require(self.num_workers >= 0, f"data.num_workers: must not be negative, not {self.num_workers}")
        _require(
            self.canonical_nodes >= 1, f"data.canonical_nodes: must be positive, not {self.canonical_nodes}"
        )
        for key in ("predownload", "cache_limit"):
            value = getattr(self, key)
            _require(value is None or value >= 0, f"data.{key}: must not be negative, not {value}")
        for name, source in self.sources.items():
            _require(
                re.fullmatch(r"[\w.-]+", name) is not None,
                f"data.sources: {name!r} names metrics too; use letters, digits, '_', '.' and '-' only",
            )
            limit = source.max_epochs
            _require(
                limit is None or limit > 0,
                f"data.sources.{name}.max_epochs: must be positive or null, not {limit}",
            )
        for i, point in enumerate(self.mix):
            for name in point.weights:
                _require(
                    name in self.sources,
                    f"data.mix[{i}].weights: {name!r} is not in data.sources{_nearest(name, self.sources)}",
                )


@dataclass
class OptimizerConfig:
    name: str = _doc("`adamw` or `lionw`, both with decoupled weight decay", "adamw")
    lr: float = _doc("peak learning rate", 3e-4)
    betas: list[float] = _doc("momentum coefficients", lambda: [0.9, 0.95])
    eps: float = _doc("AdamW's epsilon", 1e-8)
    weight_decay: float = _doc("decay of matrices; norms never decay", 0.1)
    decay_embeddings: bool = _doc("decay the embedding and the output head too", True)
    router_lr_scale: float = _doc("the routers' learning rate, relative to `lr`", 1.0)

    def check(self) -> None:
        _one_of("optimization.optimizer.name", self.name, ("adamw", "lionw"))
        _require(0 < self.lr < inf, f"optimization.optimizer.lr: must be positive, not {self.lr}")
        _require(0 < self.eps < inf, f"optimization.optimizer.eps: must be positive, not {self.eps}")
        _require(
            0 <= self.router_lr_scale < inf,
            f"optimization.optimizer.router_lr_scale: must not be negative, not {self.router_lr_scale}",
        )
        _require(
            len(self.betas) == 2 and all(0 <= b < 1 for b in self.betas),
            f"optimization.optimizer.betas: two numbers in [0, 1), not {self.betas}",
        )
        _require(
            0 <= self.weight_decay < inf,
            f"optimization.optimizer.weight_decay: must not be negative, not {self.weight_decay}",
        )


@dataclass
class LearningRateConfig:
    schedule: str = _doc("`constant`, `linear`, `cosine` or `wsd` (warmup-stable-decay)", "cosine")
    warmup: str = _doc("linear warm-up from 0", "0tok")
    decay: str = _doc("`wsd` only: length of the final linear decay", "0.1dur")
    final: float = _doc("where the decay ends, relative to the peak", 0.1)

    def check(self) -> None:
        _one_of("optimization.learning_rate.schedule", self.schedule, ("constant", "linear", "cosine", "wsd"))
        _require(
            0 <= self.final <= 1, f"optimization.learning_rate.final: must be in [0, 1], not {self.final}"
        )


@dataclass
class BatchSizeConfig:
    until: str = _doc("when the next size takes over: `2B tok` or `500ba`")
    global_batch_size: int = _doc("samples per optimizer step until then")


@dataclass
class OptimizationConfig:
    global_batch_size: int = _doc("samples (of `data.seq_len` tokens) per optimizer step, over all ranks", 8)
    batch_size_warmup: list[BatchSizeConfig] = _doc(
        "smaller global batches at first, in the order of time; then `global_batch_size`", list
    )
    microbatch_size: int | None = _doc(
        "samples (of `data.seq_len` tokens) per forward pass and rank; default: the rank's whole batch", None
    )
    clip_grad_norm: float | None = _doc("largest global gradient norm; null: no clipping", 1.0)
    balance_over: str = _doc(
        "whose load the balance loss evens out: each rank's `microbatch`, or the `global_batch` so far "
        "(arXiv 2501.11873), which lets experts specialise in what single samples are full of",
        "microbatch",
    )
    optimizer: OptimizerConfig = _doc("the optimizer", OptimizerConfig)
    learning_rate: LearningRateConfig = _doc("its learning rate over the run", LearningRateConfig)

    def check(self) -> None:
        batch, micro = self.global_batch_size, self.microbatch_size
        _require(batch >= 1, f"optimization.global_batch_size: must be positive, not {batch}")
        for i, stage in enumerate(self.batch_size_warmup):
            size = stage.global_batch_size
            key = f"optimization.batch_size_warmup[{i}].global_batch_size"
            _require(size >= 1, f"{key}: must be positive, not {size}")
        if micro is not None:
            _require(micro >= 1, f"optimization.microbatch_size: must be positive, not {micro}")
        clip = self.clip_grad_norm
        _require(
            clip is None or clip > 0, f"optimization.clip_grad_norm: must be positive or null, not {clip}"
        )
        _one_of("optimization.balance_over", self.balance_over, ("microbatch", "global_batch"))


@dataclass
class ParallelismConfig:
    replicate: int | str = _doc(
        "groups of ranks that hold the same (HSDP); gradients are reduced between them last; `auto`: as many "
        "as there are ranks for groups of `shard`",
        1,
    )
    shard: int | str = _doc(
        "ranks of a group, over which parameters, gradients and optimizer state are divided (FSDP); "
        "`auto`: all that `replicate` leaves",
        "auto",
    )
    expert: int = _doc(
        "ranks of a group that share the experts of every layer among them; tokens travel to their experts", 1
    )
    reshard_after_forward: bool = _doc(
        "free a block's gathered parameters between its forward and backward pass: less memory, one more "
        "gathering",
        True,
    )
    activation_checkpointing: str = _doc(
        "what of every block the backward pass computes again: `none`, `full` (the block), `selective` (all "
        "but matrix products and attention) or `norm_attn_norm` (attention with its norms)",
        "none",
    )
    cpu_offload: bool = _doc(
        "keep each rank's parameters, gradients and optimizer state in the host's memory, and take the "
        "optimizer's step there",
        False,
    )
    timeout: float = _doc(
        "seconds after which ranks give up waiting for each other; the writing of a checkpoint counts",
        1800.0,
    )

    def check(self) -> None:
        _require(self.expert >= 1, f"parallelism.expert: must be at least 1, not {self.expert}")
        _require(self.timeout > 0, f"parallelism.timeout: must be positive, not {self.timeout}")
        for key in ("replicate", "shard"):
            value = getattr(self, key)
            _require(
                value == "auto" or (isinstance(value, int) and value >= 1),
                f"parallelism.{key}: must be auto or a number of ranks, not {value}",
            )
        _require(
            (self.replicate, self.shard) != ("auto", "auto"),
            "parallelism.replicate: cannot be auto where shard is; use 1",
        )
        _one_of(
            "parallelism.activation_checkpointing", self.activation_checkpointing, ACTIVATION_CHECKPOINTING
        )


@dataclass
class BadStepsConfig:
    skip: bool = _doc(
        "skip the optimizer's step, on every rank alike, where loss or gradient is not finite, or far above "
        "what is usual",
        True,
    )
    window: int = _doc("good steps, the latest, that say what is usual", 128)
    warmup: int = _doc("good steps before a finite loss or gradient can be bad", 64)
    deviations: float | None = _doc(
        "how far above the median a loss or gradient norm is bad, in median absolute deviations; both of "
        "logarithms, and a deviation is 0.05 at least: so 20 is never less than 2.7 times the median; null: "
        "what is finite is good",
        20.0,
    )
    rollback_after: int | None = _doc(
        "bad steps in a row after which the run goes back to the newest checkpoint from before them; null: "
        "never",
        10,
    )
    max_rollbacks: int = _doc("roll-backs over one trouble, before the run stops with exit code 1", 3)
    pass_over: bool = _doc(
        "go back with weights and optimizer alone, and on with the data after the bad steps; otherwise what "
        "came since the checkpoint is trained on again",
        False,
    )

    def check(self) -> None:
        _require(self.window >= 1, f"bad_steps.window: must be positive, not {self.window}")
        _require(
            1 <= self.warmup <= self.window,
            f"bad_steps.warmup: must be at least 1 and at most window {self.window}, not {self.warmup}",
        )
        far = self.deviations
        _require(far is None or far > 0, f"bad_steps.deviations: must be positive or null, not {far}")
        after = self.rollback_after
        _require(
            after is None or after >= 1, f"bad_steps.rollback_after: must be positive or null, not {after}"
        )
        _require(
            self.max_rollbacks >= 0,
            f"bad_steps.max_rollbacks: must not be negative, not {self.max_rollbacks}",
        )


@dataclass
class ExportConfig:
    interval: str | None = _doc(
        "how often to save a checkpoint and export it to the run's `exports` folder; null: never", None
    )
    dtype: str = _doc("of the exported weights: `bfloat16` or `float32`", "bfloat16")


@dataclass
class CheckpointsConfig:
    interval: str = _doc("how often to save; the end of the run always is", "1000ba")
    keep: int = _doc("how many to keep in the run's folder, newest first", 2)
    asynchronous: bool = _doc(
        "go on training while a checkpoint is written, from a copy in the host's memory", False
    )
    keep_every: str | None = _doc(
        "keep for good the first checkpoint beyond every multiple of this, such as `10_000ba` or `0.1dur`; "
        "null: none but the newest",
        None,
    )
    remote: str | None = _doc(
        "object store to copy checkpoints to, such as `s3://bucket/run`; a run goes on from the newest in "
        "either place",
        None,
    )
    prune_remote: bool = _doc(
        "keep in `remote` (an S3 store) what `keep` and `keep_every` say; otherwise nothing is deleted there",
        False,
    )
    export: ExportConfig = _doc("write folders that transformers loads, beside training", ExportConfig)

    def check(self) -> None:
        _require(self.keep >= 1, f"checkpoints.keep: must be at least 1, not {self.keep}")
        _require(
            not self.prune_remote or (self.remote or "").startswith("s3://"),
            f"checkpoints.prune_remote: needs an S3 store in checkpoints.remote, not {self.remote}",
        )
        _one_of("checkpoints.export.dtype", self.export.dtype, ("bfloat16", "float32"))


@dataclass
class InitFromConfig:
    path: str | None = _doc(
        "the weights to begin with: a run's folder, one of its checkpoints, a Hugging Face folder of DBRX or "
        "Mixtral, or a file that `checkpoint consolidate` wrote; all else begins anew",
        None,
    )
    upcycle: bool = _doc(
        "the weights are of a dense model (`num_experts: 1`): every expert begins as a copy of its one",
        False,
    )

    def check(self) -> None:
        _require(self.path is not None or not self.upcycle, "init_from.upcycle: needs init_from.path")


@dataclass
class LoraConfig:
    rank: int | None = _doc(
        "train low-rank adapters of this rank beside the weights of `init_from`, which stay as they are; "
        "null: train the weights",
        None,
    )
    alpha: float = _doc("adapters count `alpha / rank`-fold", 16.0)
    targets: list[str] = _doc(
        "the matrices that have them: attention's `Wqkv` and `out_proj`, and every expert's `w1`, `v1`, `w2`",
        lambda: list(LORA_TARGETS),
    )

    def check(self) -> None:
        rank = self.rank
        _require(rank is None or rank >= 1, f"lora.rank: must be at least 1 or null, not {rank}")
        _require(0 < self.alpha < inf, f"lora.alpha: must be positive, not {self.alpha}")
        _require(bool(self.targets), f"lora.targets: name at least one of {', '.join(LORA_TARGETS)}")
        for target in self.targets:
            _one_of("lora.targets", target, LORA_TARGETS)


@dataclass
class PreferencesConfig:
    beta: float | None = _doc(
        "direct preference optimisation (DPO) of the model in `init_from`, on sources prepared with "
        "`--preferences`: how dear it is to leave it, 0.1 as a rule; null: next-token prediction",
        None,
    )

    def check(self) -> None:
        beta = self.beta
        _require(beta is None or 0 < beta < inf, f"preferences.beta: must be positive or null, not {beta}")


@dataclass
class LoggingConfig:
    mlflow_uri: str = _doc("MLflow tracking URI", "sqlite:///mlruns.db")
    experiment: str = _doc("MLflow experiment", "dbrx-train")
    interval: str = _doc("how often what costs more than a number is logged, such as expert load", "10ba")
    activations: bool = _doc("log the largest and the root mean square output of every block, too", False)
    progress: bool = _doc("progress bar, where there is a terminal", True)
    peak_flops: float | None = _doc(
        "FLOP/s of one device that MFU is relative to; default: the GPU's published dense peak, "
        "on a CPU that of a measured matrix product",
        None,
    )

    def check(self) -> None:
        peak = self.peak_flops
        _require(peak is None or 0 < peak < inf, f"logging.peak_flops: must be positive or null, not {peak}")
        _require(bool(self.experiment.strip()), "logging.experiment: must not be empty")


@dataclass
class ProfileConfig:
    at: str | None = _doc(
        "trace rank 0 from the first step that begins at this moment, such as `100ba`, into the run's "
        "`profile` folder; null: never",
        None,
    )
    steps: int = _doc("how many steps are traced", 3)
    memory: bool = _doc("keep what was allocated on the GPU meanwhile, and where, too", False)

    def check(self) -> None:
        _require(self.steps >= 1, f"profile.steps: must be at least 1, not {self.steps}")


@dataclass
class EvaluationConfig:
    interval: str = _doc("how often to evaluate on each source's held-out split", "0.25dur")
    batch_size: int = _doc("samples per forward pass and rank", 8)
    max_samples: int = _doc("most samples per source; 0: no evaluation", 256)
    at_start: bool = _doc("evaluate before the first step too", True)

    def check(self) -> None:
        _require(self.batch_size >= 1, f"evaluation.batch_size: must be positive, not {self.batch_size}")
        _require(
            self.max_samples >= 0, f"evaluation.max_samples: must not be negative, not {self.max_samples}"
        )


@dataclass
class StoppingConfig:
    grace: str = _doc("how long saving and ending may take; then the process exits at once", "5m")

    @property
    def seconds(self) -> int:
        return parse_span(self.grace, "stopping.grace")

    def check(self) -> None:
        _ = self.seconds


@dataclass
class HangsConfig:
    first_step: str | None = _doc(
        "without progress for so long, a run hangs, until its first step is done and while it evaluates; "
        "null: never",
        "30m",
    )
    step: str | None = _doc("the same from the second step on; saving does not count", "10m")

    def check(self) -> None:
        _ = self.seconds

    @property
    def seconds(self) -> tuple[int | None, int | None]:
        """Of the first step, and of the others."""
        first, others = self.first_step, self.step
        return (
            None if first is None else parse_span(first, "hangs.first_step"),
            None if others is None else parse_span(others, "hangs.step"),
        )


@dataclass
class RunConfig:
    """One run. The order is the one in which a reader wants it."""

    run_name: str = _doc("names the run; the same name resumes it")
    max_duration: str = _doc("how long to train: `1_000_000tok` or `1000ba`")
    stop_after: str | None = _doc(
        "wall time since the process began, such as `3h50m`, after which it saves and exits with 75, so that "
        "the same command goes on; null: never",
        None,
    )
    model: DbrxConfig = _doc("the model's shape", DbrxConfig)
    data: DataConfig = _doc("what it is trained on", DataConfig)
    folder: str = _doc("where the run's files go", "runs/${run_name}")
    seed: int = _doc("seed of initialisation and of all that is random but the data order", 17)
    device: str = _doc("`auto`, `cpu` or `gpu`", "auto")
    precision: str = _doc("`fp32`, or `amp_bf16` (float32 weights, bfloat16 matrix products)", "fp32")
    compile: bool = _doc("compile attention and norms (torch.compile; the first step takes longer)", False)
    tokenizer: TokenizerConfig = _doc("the tokenizer that the data was prepared with", TokenizerConfig)
    optimization: OptimizationConfig = _doc("batches, optimizer and learning rate", OptimizationConfig)
    init_from: InitFromConfig = _doc("where the first weights come from; default: drawn", InitFromConfig)
    lora: LoraConfig = _doc("adapters instead of all weights", LoraConfig)
    preferences: PreferencesConfig = _doc("learning from pairs of answers", PreferencesConfig)
    parallelism: ParallelismConfig = _doc("how the model is spread over ranks", ParallelismConfig)
    bad_steps: BadStepsConfig = _doc("what happens to steps that would spoil the weights", BadStepsConfig)
    checkpoints: CheckpointsConfig = _doc("when to save and what to keep", CheckpointsConfig)
    logging: LoggingConfig = _doc("what is shown and where it is kept", LoggingConfig)
    profile: ProfileConfig = _doc("a look into a few steps", ProfileConfig)
    evaluation: EvaluationConfig = _doc("held-out loss per source", EvaluationConfig)
    stopping: StoppingConfig = _doc("at SIGTERM, SIGUSR1 or `stop_after`", StoppingConfig)
    hangs: HangsConfig = _doc("when a run that makes no progress ends, with 74", HangsConfig)

    def check(self) -> None:
        """Refuse what cannot be run; sections first.

        Raises:
            ConfigError: one line that names the key.
        """
        for section in (
            self.data,
            self.optimization,
            self.optimization.optimizer,
            self.optimization.learning_rate,
            self.lora,
            self.preferences,
            self.init_from,
            self.parallelism,
            self.bad_steps,
            self.checkpoints,
            self.logging,
            self.profile,
            self.evaluation,
            self.stopping,
            self.hangs,
        ):
            section.check()
        _ = self.stop_after_seconds
        _one_of("device", self.device, ("auto", "cpu", "gpu"))
        _one_of("precision", self.precision, ("fp32", "amp_bf16"))
        _require(
            self.lora.rank is None or self.init_from.path is not None,
            "lora.rank: adapters stand beside weights; say whose with init_from.path",
        )
        _require(
            self.lora.rank is None or not self.init_from.upcycle,
            "lora.rank: adapters stand beside weights that are kept; set init_from.upcycle in a run before",
        )
        _require(
            self.preferences.beta is None or self.init_from.path is not None,
            "preferences.beta: needs a model whose answers to compare; name it with init_from.path",
        )
        _require(
            self.preferences.beta is None or not self.model.output_z_loss_weight,
            "model.output_z_loss_weight: is of next-token prediction; preferences need it to be 0",
        )
        _require(
            re.fullmatch(r"\w[\w .+=@,-]{,199}", self.run_name) is not None,
            f"run_name: {self.run_name!r} names a folder too; begin with a letter or digit, and go on with "
            f"those, blanks and any of _ . + = @ , - (200 in all)",
        )
        _require(0 <= self.seed < 2**32, f"seed: must be at least 0 and below 2**32, not {self.seed}")
        longest = self.model.max_seq_len
        points = enumerate(self.data.mix)
        lengths = {"data.seq_len": self.data.seq_len} | {
            f"data.mix[{i}].seq_len": p.seq_len for i, p in points
        }
        for key, seq_len in lengths.items():
            _require(
                seq_len is None or 2 <= seq_len <= longest,
                f"{key}: must be at least 2 and at most model.max_seq_len {longest}, not {seq_len}",
            )
        clock, nodes = self.clock, self.data.canonical_nodes
        for stage in clock.stages:
            _require(
                stage.global_batch_size % nodes == 0,
                f"data.canonical_nodes: {nodes} does not divide {stage}",
            )
        for key in (
            "optimization.learning_rate.warmup",
            "optimization.learning_rate.decay",
            "checkpoints.interval",
            "checkpoints.keep_every",
            "checkpoints.export.interval",
            "logging.interval",
            "evaluation.interval",
            "profile.at",
        ):
            value = attrgetter(key)(self)
            if value is None:
                continue
            length = clock.tokens(value, key)
            _require(
                length > 0 or key.endswith(("warmup", "decay", "at")), f"{key}: must be longer than nothing"
            )
        with naming("data."):
            self.mix_schedule().sample_lengths(clock)
        self._warn_of_learning_rate(clock)
        for stage in clock.stages:
            if stage.batch >= clock.total_batches:
                warnings.warn(
                    f"the run ends at {clock.total_tokens:,} tokens, before {stage} is ever taken "
                    f"(batch_size_warmup, or seq_len in the mix)",
                    stacklevel=2,
                )

    def _warn_of_learning_rate(self, clock: Clock) -> None:
        """Say what a schedule will not come to."""
        given, total = self.optimization.learning_rate, clock.total_tokens
        warmup = clock.tokens(given.warmup)
        if warmup > total:
            warnings.warn(
                f"optimization.learning_rate.warmup: its {warmup:,} tokens are more than the run's "
                f"{total:,}, so the learning rate ends at {total / warmup:.3g} of its peak and never falls",
                stacklevel=3,
            )
        elif given.schedule == "wsd" and (decay := clock.tokens(given.decay)) > total - warmup:
            warnings.warn(
                f"optimization.learning_rate.decay: its {decay:,} tokens are more than the "
                f"{total - warmup:,} that warmup leaves of the run's {total:,}; the decay takes these",
                stacklevel=3,
            )

    @property
    def stop_after_seconds(self) -> int | None:
        return None if self.stop_after is None else parse_span(self.stop_after, "stop_after")

    @property
    def clock(self) -> Clock:
        """The sizes of the run's steps, and what they make of its durations.

        Raises:
            ConfigError: they do not fit together.
        """
        optimization = self.optimization
        sizes = [s.global_batch_size for s in optimization.batch_size_warmup]
        sizes.append(optimization.global_batch_size)
        clock = Clock.of(self.max_duration, seq_len=self.data.seq_len, global_batch_size=sizes[0])
        for i, (stage, size) in enumerate(zip(optimization.batch_size_warmup, sizes[1:], strict=True)):
            with naming(f"optimization.batch_size_warmup[{i}]."):
                clock = clock.with_batch_size(stage.until, size)
        before = -1
        for i, point in enumerate(self.data.mix):
            if point.seq_len is not None:
                with naming("data."):
                    at = clock.tokens(point.at, f"mix[{i}].at")
                _require(
                    at > before, f"data.mix[{i}].at: comes no later than a point before it that sets seq_len"
                )
                before = at
                with naming(f"data.mix[{i}]."):
                    clock = clock.with_seq_len(point.at, point.seq_len)
        return clock

    @property
    def mix_ticks(self) -> int:
        """Length of the run in the mix's unit of time, a sample on every canonical node."""
        return self.clock.total_samples // self.data.canonical_nodes

    @property
    def sample_lengths(self) -> dict[str, int]:
        """Tokens of a sample of each source that the mix ever reads."""
        return self.mix_schedule().sample_lengths(self.clock)

    def check_repetition(self, mix: MixSchedule, sizes: Mapping[str, int]) -> None:
        """Hold the run's ``mix`` over sources of ``sizes`` samples against their ``max_epochs``.

        Raises:
            ValueError: a source is read more often.
        """
        limits = {name: s.max_epochs for name, s in self.data.sources.items() if s.max_epochs is not None}
        mix.repetition(sizes, self.mix_ticks, limits)

    def mix_schedule(self) -> MixSchedule:
        """The data mix over this run: as given, or all sources alike."""
        alike = MixPointConfig(at="0tok", weights=dict.fromkeys(self.data.sources, 1.0))
        return MixSchedule.from_config(
            [dataclasses.asdict(point) for point in self.data.mix or [alike]],
            self.clock,
            sources=list(self.data.sources),
            canonical_nodes=self.data.canonical_nodes,
        )


def load(path: str | Path, overrides: Sequence[str] = ()) -> RunConfig:
    """Read a run's YAML, apply ``key=value`` overrides, and check the whole.

    ``variables:`` holds values for interpolation (``${variables.d_model}``) and is not part of the result.

    Raises:
        ConfigError: anything is wrong with it; one line that names the file or the key.
    """
    given = _read_yaml(Path(path))
    for override in overrides:
        given = _override(given, override)
    try:
        resolved = OmegaConf.to_container(given, resolve=True)
    except OmegaConfBaseException as error:
        raise ConfigError(f"{path}: {first_line(error)}") from None
    assert isinstance(resolved, dict)
    resolved.pop("variables", None)
    for key, nearest in _unknown_keys(resolved, RunConfig):
        raise ConfigError(f"{path}: unknown key {key}{nearest}")
    try:
        config = OmegaConf.to_object(OmegaConf.merge(OmegaConf.structured(RunConfig), resolved))
    except (OmegaConfBaseException, TypeError) as error:
        where, line = str(getattr(error, "full_key", None) or ""), first_line(error)
        raise ConfigError(f"{path}: {line if where in line else f'{where}: {line}'}") from None
    except ValueError as error:  # DbrxConfig checks itself when it is made
        raise ConfigError(f"{path}: model.{first_line(error)}") from None
    assert isinstance(config, RunConfig)
    try:
        config.check()
    except ValueError as error:
        raise ConfigError(f"{path}: {error}") from None
    return config


def to_dict(config: RunConfig) -> dict[str, Any]:
    """The whole run as plain dicts, lists and scalars, defaults included."""
    return dataclasses.asdict(config)


def for_record(config: RunConfig) -> dict[str, Any]:
    """The same with secrets masked, for all that is kept."""
    masked: dict[str, Any] = mask_tree(to_dict(config))
    return masked


RECORD = "# What a run was, with every default; written by dbrx-train at each start.\n"
"""The first line of a run's config.yaml."""


def to_yaml(config: RunConfig) -> str:
    """The whole run as YAML that ``load`` reads back, secrets masked."""
    return RECORD + OmegaConf.to_yaml(OmegaConf.create(for_record(config)))


def flatten(tree: dict[str, Any], prefix: str = "") -> Iterator[tuple[str, Any]]:
    """``{"a": {"b": 1}}`` -> ``("a.b", 1)``; lists stay whole."""
    for key, value in tree.items():
        if isinstance(value, dict) and value:
            yield from flatten(value, f"{prefix}{key}.")
        else:
            yield prefix + key, value


def _read_yaml(path: Path) -> DictConfig:
    try:
        given = OmegaConf.load(path)
    except FileNotFoundError:
        raise ConfigError(f"{path}: no such file") from None
    except (OSError, UnicodeDecodeError) as error:
        raise ConfigError(f"{path}: cannot be read ({first_line(error)})") from None
    except yaml.YAMLError as error:
        mark = getattr(error, "problem_mark", None)
        line = f", line {mark.line + 1}" if mark else ""
        problem = getattr(error, "problem", None) or first_line(error)
        raise ConfigError(f"{path}{line}: not valid YAML: {problem}") from None
    if not isinstance(given, DictConfig):
        raise ConfigError(f"{path}: a run is a mapping of keys, such as run_name and model")
    return given


def _override(given: DictConfig, override: str) -> DictConfig:
    key, equals, _ = override.partition("=")
    _require(bool(equals and key.strip()), f"{override!r}: an override has the form key=value")
    try:
        merged = OmegaConf.merge(given, OmegaConf.from_dotlist([override]))
    except (OmegaConfBaseException, yaml.YAMLError, TypeError) as error:
        raise ConfigError(f"{override!r}: {first_line(error)}") from None
    assert isinstance(merged, DictConfig)
    return merged


def _unknown_keys(given: dict[Any, Any], schema: Any, prefix: str = "") -> Iterator[tuple[str, str]]:
    """Each key of ``given`` that ``schema`` lacks, with the nearest one that it has."""
    known = {f.name: f.type for f in dataclasses.fields(schema)}
    for key, value in given.items():
        if key not in known:
            yield f"{prefix}{key}", _nearest(str(key), known)
            continue
        inner: Any = known[key]
        if dataclasses.is_dataclass(inner) and isinstance(value, dict):
            yield from _unknown_keys(value, inner, f"{prefix}{key}.")
        elif getattr(inner, "__origin__", None) is dict and isinstance(value, dict):
            element = inner.__args__[1]
            for name, item in value.items():
                if dataclasses.is_dataclass(element) and isinstance(item, dict):
                    yield from _unknown_keys(item, element, f"{prefix}{key}.{name}.")
        elif getattr(inner, "__origin__", None) is list and isinstance(value, list):
            element = inner.__args__[0]
            for i, item in enumerate(value):
                if dataclasses.is_dataclass(element) and isinstance(item, dict):
                    yield from _unknown_keys(item, element, f"{prefix}{key}[{i}].")


def _nearest(name: str, known: Any) -> str:
    close = difflib.get_close_matches(name, [str(k) for k in known], n=1, cutoff=0.5)
    return f"; did you mean {close[0]}?" if close else f"; known: {', '.join(map(str, known))}"


def first_line(error: BaseException) -> str:
    """An error's message, or its name where it has none, cut to one line."""
    return (str(error).strip() or type(error).__name__).splitlines()[0]
