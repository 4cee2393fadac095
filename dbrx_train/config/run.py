"""One run: its sections, and what they ask of each other."""

import dataclasses
from collections.abc import Mapping
from dataclasses import dataclass
from operator import attrgetter

from dbrx_train.config.errors import naming, require
from dbrx_train.config.plan import PlanConfig
from dbrx_train.config.sections import (
    BadStepsConfig,
    CheckpointsConfig,
    DataConfig,
    EvaluationConfig,
    InitFromConfig,
    LoggingConfig,
    LoraConfig,
    MixPointConfig,
    OptimizationConfig,
    ParallelismConfig,
    PreemptionConfig,
    PreferencesConfig,
    ProfileConfig,
    TokenizerConfig,
    WatchdogConfig,
)
from dbrx_train.config.unreached import warn_of_unreached
from dbrx_train.data.mix.schedule import MixSchedule
from dbrx_train.model.config import DbrxConfig
from dbrx_train.options import option
from dbrx_train.schedule import Clock, parse_span


@dataclass
class RunConfig:
    """One run. The order is the one in which a reader wants it."""

    run_name: str = option("names the run; the same name resumes it")
    max_duration: str = option(
        "how long to train: `1_000_000tok` or `1000ba`; of a single source also `2ep`, in whole steps"
    )
    stop_after: str | None = option(
        "wall time since the process began, such as `3h50m`, after which it saves and exits with 75, so that "
        "the same command goes on; null: never",
        None,
    )
    model: DbrxConfig = option(
        "the model's shape; must be given, in whole or as far as it is not that of `init_from`", DbrxConfig
    )
    data: DataConfig = option("what it is trained on", DataConfig)
    folder: str = option("where the run's files go", "runs/${run_name}")
    seed: int = option(
        "seed of initialisation and of all that is random but the data order", 17, ge=0, lt=2**32
    )
    device: str = option("where to train", "auto", one_of=("auto", "cpu", "gpu"))
    precision: str = option(
        "`amp_bf16`: float32 weights, bfloat16 matrix products", "fp32", one_of=("fp32", "amp_bf16")
    )
    compile: bool = option("compile attention and norms (torch.compile; the first step takes longer)", False)
    tokenizer: TokenizerConfig = option("the tokenizer that the data was prepared with", TokenizerConfig)
    optimization: OptimizationConfig = option("batches, optimizer and learning rate", OptimizationConfig)
    init_from: InitFromConfig = option("where the first weights come from; default: drawn", InitFromConfig)
    lora: LoraConfig = option("adapters instead of all weights", LoraConfig)
    preferences: PreferencesConfig = option("learning from pairs of answers", PreferencesConfig)
    parallelism: ParallelismConfig = option("how the model is spread over ranks", ParallelismConfig)
    bad_steps: BadStepsConfig = option("what happens to steps that would spoil the weights", BadStepsConfig)
    checkpoints: CheckpointsConfig = option("when to save and what to keep", CheckpointsConfig)
    logging: LoggingConfig = option("what is shown and where it is kept", LoggingConfig)
    profile: ProfileConfig = option("a look into a few steps", ProfileConfig)
    evaluation: EvaluationConfig = option("held-out loss per source", EvaluationConfig)
    preemption: PreemptionConfig = option("at SIGTERM, SIGUSR1 or `stop_after`", PreemptionConfig)
    watchdog: WatchdogConfig = option("when a run that makes no progress ends, with 74", WatchdogConfig)
    plan: PlanConfig = option("what `dbrx-train plan` reckons with; training does not look at it", PlanConfig)

    def check(self) -> None:
        """What the sections ask of each other; each alone has been checked before."""
        _ = self.stop_after_seconds
        require(
            self.lora.rank is None or self.init_from.path is not None,
            "lora.rank: adapters stand beside weights; say whose with init_from.path",
        )
        require(
            self.lora.rank is None or not self.init_from.upcycle,
            "lora.rank: adapters stand beside weights that are kept; set init_from.upcycle in a run before",
        )
        require(
            self.preferences.beta is None or self.init_from.path is not None,
            "preferences.beta: needs a model whose answers to compare; name it with init_from.path",
        )
        require(
            self.preferences.beta is None or not self.model.output_z_loss_weight,
            "model.output_z_loss_weight: is of next-token prediction; preferences need it to be 0",
        )
        require(
            _names_a_folder(self.run_name),
            f"run_name: {self.run_name!r} names a folder, too, which must lie inside of `runs`: no part of "
            f"it may be empty, . or .., and it has at most 200 bytes and no control character",
        )
        longest = self.model.max_seq_len
        points = enumerate(self.data.mix)
        lengths = {"data.seq_len": self.data.seq_len} | {
            f"data.mix[{i}].seq_len": p.seq_len for i, p in points
        }
        for key, seq_len in lengths.items():
            require(
                seq_len is None or 2 <= seq_len <= longest,
                f"{key}: must be at least 2 and at most model.max_seq_len {longest}, not {seq_len}",
            )
        most, micro = self.optimization.global_batch_size, self.optimization.microbatch_size
        require(
            micro is None or micro <= most,
            f"optimization.microbatch_size: {micro} samples are more than the {most} of global_batch_size, "
            f"over all ranks; use fewer, or leave it out",
        )
        clock, nodes = self.clock, self.data.canonical_nodes
        for stage in clock.stages:
            require(
                stage.global_batch_size % nodes == 0,
                f"data.canonical_nodes: {nodes} does not divide {stage}",
            )
        for key in (
            "optimization.learning_rate.warmup",
            "optimization.learning_rate.decay",
            "optimization.learning_rate.scale",
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
            require(
                length > 0 or key.endswith(("warmup", "decay", "at")), f"{key}: must be longer than nothing"
            )
        with naming("data."):
            self.mix_schedule().sample_lengths(clock)
        given = self.optimization.learning_rate
        require(
            given.schedule != "inverse_sqrt" or clock.tokens(given.scale or given.warmup) > 0,
            "optimization.learning_rate.scale: is that of warmup, which is nothing; set either",
        )
        warn_of_unreached(self)

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
                require(
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


def _names_a_folder(name: str) -> bool:
    """One that lies inside of another."""
    parts = [part.strip() for part in name.split("/")]
    return name.isprintable() and len(name.encode()) <= 200 and not {"", ".", ".."} & set(parts)
