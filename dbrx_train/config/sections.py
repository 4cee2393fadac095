"""The sections of a run's YAML: every key is documented here, once, with the values that it takes.

docs/configuration.md is generated from these fields. Nothing heavy is imported, so that a wrong file is
refused within a fraction of a second. (Annotations are types here, which OmegaConf reads: no ``from
__future__ import annotations``.)
"""

import re
from dataclasses import dataclass

from dbrx_train.config.errors import nearest, require
from dbrx_train.model.config import ACTIVATION_CHECKPOINTING, LORA_TARGETS
from dbrx_train.options import option
from dbrx_train.schedule import parse_span


@dataclass
class TokenizerConfig:
    name: str = option("`cl100k_base`, DBRX's, or what to call that of `vocab_file`", "cl100k_base")
    vocab_file: str | None = option("a `.tiktoken` vocabulary, or a `tokenizer.json`, to use instead", None)


@dataclass
class SourceConfig:
    local: str = option("folder that `dbrx-train data prepare` wrote, or where to cache `remote`")
    remote: str | None = option(
        "the same folder on an object store (any URL that mosaicml-streaming reads)", None
    )
    max_epochs: float | None = option(
        "refuse a mix that repeats this source more often than this", None, gt=0
    )
    val: str | None = option(
        "folder of held-out data of one's own (`data prepare --split val`), to evaluate on in place of what "
        "is held out in `local`",
        None,
    )


@dataclass
class MixPointConfig:
    at: str = option("when: `0tok`, `2_000_000tok`, `0.7dur` or `10ba`")
    weights: dict[str, float] = option(
        "share of each source; need not sum to 1; a source left out gets 0", dict
    )
    interpolation: str = option(
        "`step`: jump here; `linear`: ramp from the point before", "step", one_of=("step", "linear")
    )
    seq_len: int | None = option(
        "tokens per sample from here on, of sources prepared at that length; a step keeps its tokens", None
    )


@dataclass
class DataConfig:
    sources: dict[str, SourceConfig] = option("name -> where its shards are", dict)
    mix: list[MixPointConfig] = option("the data mix over the run; default: one point, equal weights", list)
    seq_len: int = option(
        "tokens per sample; must be that of the prepared shards (`mix` may change it later)", 2048
    )
    shuffle: bool = option("shuffle within and across shards", True)
    shuffle_seed: int = option("seed of the shuffle", 9176)
    canonical_nodes: int = option(
        "parts that each source is cut into; must divide `global_batch_size`", 1, gt=0
    )
    num_workers: int = option("DataLoader worker processes per rank", 1, ge=0)
    predownload: int | None = option("samples prepared ahead per worker; default: eight batches", None, ge=0)
    cache_limit: int | None = option(
        "bytes of disk that all sources may keep locally of `remote` data", None, ge=0
    )

    def check(self) -> None:
        require(
            bool(self.sources), "data.sources: name at least one source, such as {web: {local: data/web}}"
        )
        for name in self.sources:
            require(
                re.fullmatch(r"[\w.-]+", name) is not None,
                f"data.sources: {name!r} names metrics too; use letters, digits, '_', '.' and '-' only",
            )
        for i, point in enumerate(self.mix):
            for name in point.weights:
                require(
                    name in self.sources,
                    f"data.mix[{i}].weights: {name!r} is not in data.sources{nearest(name, self.sources)}",
                )


@dataclass
class OptimizerConfig:
    name: str = option(
        "`adamw` or `lionw`, both with decoupled weight decay", "adamw", one_of=("adamw", "lionw")
    )
    lr: float = option("peak learning rate", 3e-4, gt=0, le=10)
    betas: list[float] = option("momentum coefficients", lambda: [0.9, 0.95])
    eps: float = option("AdamW's epsilon", 1e-8, gt=0)
    weight_decay: float = option("decay of matrices; norms never decay", 0.1, ge=0)
    state_dtype: str = option(
        "what AdamW's moments are kept in, `float32` or `bfloat16`: 8 bytes a parameter or 4, rounded "
        "stochastically",
        "float32",
        one_of=("float32", "bfloat16"),
    )
    decay_embeddings: bool = option("decay the embedding and the output head too", True)
    router_lr_scale: float = option("the routers' learning rate, relative to `lr`", 1.0, ge=0)

    def check(self) -> None:
        require(
            len(self.betas) == 2 and all(0 <= b < 1 for b in self.betas),
            f"optimization.optimizer.betas: two numbers in [0, 1), not {self.betas}",
        )
        require(
            self.name == "adamw" or self.state_dtype == "float32",
            f"optimization.optimizer.state_dtype: {self.state_dtype} is for adamw; {self.name} keeps one "
            "moment, in float32",
        )


@dataclass
class LearningRateConfig:
    schedule: str = option(
        "how it falls; `wsd`: warmup-stable-decay; `inverse_sqrt`: with the root of time, then linearly",
        "cosine",
        one_of=("constant", "linear", "cosine", "wsd", "inverse_sqrt"),
    )
    warmup: str = option("linear warm-up from 0", "0tok")
    decay: str = option("`wsd`, `inverse_sqrt`: length of the final linear decay", "0.1dur")
    scale: str | None = option(
        "`inverse_sqrt` only: how long after `warmup` the rate is 1 / sqrt(2) of its peak; default: `warmup`",
        None,
    )
    floor: float = option(
        "`inverse_sqrt` only: what the rate nears in infinite time, relative to the peak",
        0.0,
        ge=0,
        lt=1,
    )
    final: float = option("where the decay ends, relative to the peak", 0.1, ge=0, le=1)

    @property
    def decays_last(self) -> bool:
        """Whether the run ends with a linear decay of its own length."""
        return self.schedule in ("wsd", "inverse_sqrt")


@dataclass
class BatchSizeConfig:
    until: str = option("when the next size takes over: `2B tok` or `500ba`")
    global_batch_size: int = option("samples per optimizer step until then", gt=0)


@dataclass
class OptimizationConfig:
    global_batch_size: int = option(
        "samples (of `data.seq_len` tokens) per optimizer step, over all ranks", 8, gt=0
    )
    batch_size_warmup: list[BatchSizeConfig] = option(
        "smaller global batches at first, in the order of time; then `global_batch_size`", list
    )
    microbatch_size: int | None = option(
        "samples (of `data.seq_len` tokens) per forward pass and rank; default: the rank's whole batch",
        None,
        gt=0,
    )
    clip_grad_norm: float | None = option("largest global gradient norm; null: no clipping", 1.0, gt=0)
    balance_over: str = option(
        "whose load the balance loss evens out: each rank's `microbatch`, or the `global_batch` so far "
        "(arXiv 2501.11873), which lets experts specialise in what single samples are full of",
        "microbatch",
        one_of=("microbatch", "global_batch"),
    )
    optimizer: OptimizerConfig = option("the optimizer", OptimizerConfig)
    learning_rate: LearningRateConfig = option("its learning rate over the run", LearningRateConfig)


@dataclass
class ParallelismConfig:
    replicate: int | str = option(
        "groups of ranks that hold the same (HSDP); gradients are reduced between them last; `auto`: as many "
        "as there are ranks for groups of `shard`",
        1,
    )
    shard: int | str = option(
        "ranks of a group, over which parameters, gradients and optimizer state are divided (FSDP); "
        "`auto`: all that `replicate` leaves",
        "auto",
    )
    expert: int = option(
        "ranks of a group that share the experts of every layer among them; tokens travel to their experts",
        1,
        ge=1,
    )
    innermost: str = option(
        "which ranks of a group are neighbours, and so on one machine: `expert`, those that share experts, "
        "so that tokens stay within it; or `shard`, those that divide an expert's weights, so that these do",
        "expert",
        one_of=("expert", "shard"),
    )
    reduce_dtype: str = option(
        "what gradients of the large matrices are scattered and reduced in, `float32` or `bfloat16`: half "
        "the bytes, but every sum over ranks is rounded",
        "float32",
        one_of=("float32", "bfloat16"),
    )
    reshard_after_forward: bool = option(
        "free a block's gathered parameters between its forward and backward pass: less memory, one more "
        "gathering",
        True,
    )
    activation_checkpointing: str = option(
        "what of every block the backward pass computes again: `none`, `full` (the block), "
        "`full_keep_dispatched` (the block, but tokens that came from other ranks are kept), `selective` "
        "(all but matrix products and attention) or `norm_attn_norm` (attention with its norms)",
        "none",
        one_of=ACTIVATION_CHECKPOINTING,
    )
    cpu_offload: bool = option(
        "keep each rank's parameters, gradients and optimizer state in the host's memory, and take the "
        "optimizer's step there",
        False,
    )
    timeout: float = option(
        "seconds after which ranks give up waiting for each other; the writing of a checkpoint counts",
        1800.0,
        gt=0,
    )

    def check(self) -> None:
        for key in ("replicate", "shard"):
            value = getattr(self, key)
            require(
                value == "auto" or (isinstance(value, int) and value >= 1),
                f"parallelism.{key}: must be auto or a number of ranks, not {value}",
            )
        require(
            (self.replicate, self.shard) != ("auto", "auto"),
            "parallelism.replicate: cannot be auto where shard is; use 1",
        )


@dataclass
class BadStepsConfig:
    skip: bool = option(
        "skip the optimizer's step, on every rank alike, where loss or gradient is not finite, or far above "
        "what is usual",
        True,
    )
    window: int = option("good steps, the latest, that say what is usual", 128, gt=0)
    warmup: int = option("good steps before a finite loss or gradient can be bad", 64, ge=1)
    mad_threshold: float | None = option(
        "how far above the median a loss or gradient norm is bad, in median absolute deviations; both of "
        "logarithms, and a deviation is 0.05 at least: so 30 is never less than 4.5 times the median; null: "
        "what is finite is good",
        30.0,
        gt=0,
    )
    rollback_after: int | None = option(
        "bad steps in a row after which the run goes back to the newest checkpoint from before them; null: "
        "never",
        10,
        gt=0,
    )
    max_rollbacks: int = option("roll-backs over one trouble, before the run stops with exit code 1", 3, ge=0)
    skip_data: bool = option(
        "go back with weights and optimizer alone, and on with the data after the bad steps; otherwise what "
        "came since the checkpoint is trained on again",
        False,
    )

    def check(self) -> None:
        require(
            self.warmup <= self.window,
            f"bad_steps.warmup: must be at most window {self.window}, not {self.warmup}",
        )


@dataclass
class ExportConfig:
    interval: str | None = option(
        "how often to save a checkpoint and export it to the run's `exports` folder; null: never", None
    )
    dtype: str = option("of the exported weights", "bfloat16", one_of=("bfloat16", "float32"))


@dataclass
class CheckpointsConfig:
    interval: str = option("how often to save; the end of the run always is", "100ba")
    keep: int = option("how many to keep in the run's folder, newest first", 2, ge=1)
    asynchronous: bool = option(
        "go on training while a checkpoint is written, from a copy in the host's memory", False
    )
    keep_every: str | None = option(
        "keep for good the first checkpoint beyond every multiple of this, such as `10_000ba` or `0.1dur`; "
        "null: none but the newest",
        None,
    )
    remote: str | None = option(
        "object store to copy checkpoints to, such as `s3://bucket/run`; a run goes on from the newest in "
        "either place",
        None,
    )
    prune_remote: bool = option(
        "keep in `remote` (an S3 store) what `keep` and `keep_every` say; otherwise nothing is deleted there",
        False,
    )
    export: ExportConfig = option("write folders that transformers loads, beside training", ExportConfig)

    def check(self) -> None:
        require(
            not self.prune_remote or (self.remote or "").startswith("s3://"),
            f"checkpoints.prune_remote: needs an S3 store in checkpoints.remote, not {self.remote}",
        )


@dataclass
class InitFromConfig:
    path: str | None = option(
        "the weights to begin with: a run's folder, one of its checkpoints, a Hugging Face folder of DBRX or "
        "Mixtral, a file that `checkpoint consolidate` wrote, or a registered model (`models:/NAME@ALIAS`); "
        "all else begins anew",
        None,
    )
    upcycle: bool = option(
        "the weights are of a dense model (`num_experts: 1`): every expert begins as a copy of its one",
        False,
    )

    def check(self) -> None:
        require(self.path is not None or not self.upcycle, "init_from.upcycle: needs init_from.path")


@dataclass
class LoraConfig:
    rank: int | None = option(
        "train low-rank adapters of this rank beside the weights of `init_from`, which stay as they are; "
        "null: train the weights",
        None,
        ge=1,
    )
    alpha: float = option("adapters count `alpha / rank`-fold", 16.0, gt=0)
    targets: list[str] = option(
        "the matrices that have them: attention's `Wqkv` and `out_proj`, and every expert's `w1`, `v1`, `w2`",
        lambda: list(LORA_TARGETS),
    )

    def check(self) -> None:
        known = ", ".join(LORA_TARGETS)
        require(bool(self.targets), f"lora.targets: name at least one of {known}")
        for target in self.targets:
            require(target in LORA_TARGETS, f"lora.targets: {target!r} is not one of {known}")


@dataclass
class PreferencesConfig:
    beta: float | None = option(
        "direct preference optimisation (DPO) of the model in `init_from`, on sources prepared with "
        "`--preferences`: how dear it is to leave it, 0.1 as a rule; null: next-token prediction",
        None,
        gt=0,
    )


@dataclass
class LoggingConfig:
    mlflow_uri: str = option("MLflow tracking URI", "sqlite:///mlruns.db")
    experiment: str = option("MLflow experiment", "dbrx-train")
    tensorboard: bool = option(
        "write metrics for TensorBoard, too, into the run's `tensorboard` folder (extra `tensorboard`)", False
    )
    wandb: str | None = option(
        "Weights & Biases project to log metrics to, too (extra `wandb`); `WANDB_MODE=offline` keeps them in "
        "the run's folder",
        None,
    )
    interval: str = option("how often what costs more than a number is logged, such as expert load", "10ba")
    activations: bool = option("log the largest and the root mean square output of every block, too", False)
    progress: bool = option("a progress bar where there is a terminal, else a line every `interval`", True)
    peak_flops: float | None = option(
        "FLOP/s of one device that MFU is relative to; default: the GPU's published dense peak, "
        "on a CPU that of a measured matrix product",
        None,
        gt=0,
    )

    def check(self) -> None:
        require(bool(self.experiment.strip()), "logging.experiment: must not be empty")


@dataclass
class ProfileConfig:
    at: str | None = option(
        "trace rank 0 from the first step that begins at this moment, such as `100ba`, into the run's "
        "`profile` folder; null: never",
        None,
    )
    steps: int = option("how many steps are traced", 3, ge=1)
    memory: bool = option("keep what was allocated on the GPU meanwhile, and where, too", False)


@dataclass
class EvaluationConfig:
    interval: str = option("how often to evaluate on each source's held-out split", "0.25dur")
    batch_size: int = option("samples per forward pass and rank", 8, gt=0)
    max_samples: int = option("most samples per source; 0: no evaluation", 256, ge=0)
    at_start: bool = option("evaluate before the first step too", True)
    tasks: list[str] = option(
        "in-context tasks to evaluate as often: files with `icl_tasks:`, `gauntlet`, or tasks' labels "
        "([evaluation](evaluation.md))",
        list,
    )
    tasks_data: str | None = option("the folder of the tasks' data; null: that of their file", None)
    tasks_limit: int = option("examples of each task, from the first on", 200, gt=0)


@dataclass
class PreemptionConfig:
    grace_period: str = option("how long saving and ending may take; then the process exits at once", "5m")

    @property
    def seconds(self) -> int:
        return parse_span(self.grace_period, "preemption.grace_period")

    def check(self) -> None:
        _ = self.seconds


@dataclass
class WatchdogConfig:
    first_step: str | None = option(
        "without progress for so long, a run hangs, until its first step is done and while it evaluates; "
        "null: never",
        "30m",
    )
    step: str | None = option("the same from the second step on; saving does not count", "10m")

    def check(self) -> None:
        _ = self.seconds

    @property
    def seconds(self) -> tuple[int | None, int | None]:
        """Of the first step, and of the others."""
        first, others = self.first_step, self.step
        return (
            None if first is None else parse_span(first, "watchdog.first_step"),
            None if others is None else parse_span(others, "watchdog.step"),
        )
