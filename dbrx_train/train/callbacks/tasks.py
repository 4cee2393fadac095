"""In-context tasks during training."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import torch
from composer import Callback, Event, Logger, State

from dbrx_train.config import RunConfig, naming
from dbrx_train.data.tokenizer import Tokenizer
from dbrx_train.evaluate.benchmark import Benchmark
from dbrx_train.evaluate.outcomes import Result, result
from dbrx_train.evaluate.tasks import select
from dbrx_train.schedule import Clock
from dbrx_train.train.environment import print_rank0
from dbrx_train.train.intervals import every
from dbrx_train.train.train_state import model_of

__all__ = ["InContextTasks", "task_benchmark"]


def task_benchmark(config: RunConfig, tokenizer: Tokenizer) -> Benchmark | None:
    """The tasks of ``evaluation.tasks``, or None.

    Raises:
        ConfigError: a task, or a row of its data, is not as it must be.
    """
    options = config.evaluation
    if not options.tasks:
        return None
    data = Path(options.tasks_data) if options.tasks_data else None
    with naming("evaluation.tasks: "):
        return Benchmark(
            select(options.tasks, data),
            tokenizer,
            max_seq_len=config.model.max_seq_len,
            limit=options.tasks_limit,
        )


class InContextTasks(Callback):  # type: ignore[misc]
    """Logs, every ``interval`` and of the model as it is spread over all ranks,

    - ``tasks/LABEL/N-shot/score``;
    - ``tasks/LABEL/N-shot/bits_per_byte``: of the right answer.

    It draws no random number. Comes after what may drop a step, or roll it back.

    Args:
        at_start: evaluate before the first step, too.
        autocast: run in bfloat16.
        watching: callbacks that are told of this as of any other evaluation.
    """

    def __init__(
        self,
        benchmark: Benchmark,
        interval: str,
        clock: Clock,
        *,
        at_start: bool,
        autocast: bool,
        watching: Sequence[Callback],
    ) -> None:
        self.benchmark, self.due, self.clock = benchmark, every(interval), clock
        self.times = clock.total_tokens // clock.tokens(interval)
        self.at_start, self.autocast, self.watching = at_start, autocast, watching

    def fit_start(self, state: State, logger: Logger) -> None:
        if state.timestamp.batch.value:
            return
        examples, tokens = self.benchmark.cost()
        # A forward pass is a third of a training step.
        share = (self.times + self.at_start) * tokens / 3 / self.clock.total_tokens
        print_rank0(
            f"in-context tasks: {examples:,} examples, {tokens:,} tokens each time, {share:.1%} of the run"
        )
        if self.at_start:
            self._evaluate(state, logger)

    def batch_end(self, state: State, logger: Logger) -> None:
        if self.due(state):
            self._evaluate(state, logger)

    def _evaluate(self, state: State, logger: Logger) -> None:
        self._tell(Event.EVAL_BEFORE_ALL, state, logger)
        model, results = model_of(state), dict[str, Result]()
        was_training = model.training
        model.eval()
        device = next(model.parameters()).device.type
        with torch.autocast(device, torch.bfloat16, enabled=self.autocast):
            for part in self.benchmark.parts:
                outcomes = []
                for outcome in self.benchmark.run(model, part):
                    outcomes.append(outcome)
                    self._tell(Event.EVAL_BATCH_END, state, logger)
                results[part.name] = result(part.task, outcomes)
        model.train(was_training)
        metrics = {f"tasks/{name}/score": found.score for name, found in results.items()}
        for name, found in results.items():
            if found.bits_per_byte is not None:
                metrics[f"tasks/{name}/bits_per_byte"] = found.bits_per_byte
        logger.log_metrics(metrics)
        seen = state.timestamp.token.value
        for name, found in results.items():
            bits = "" if found.bits_per_byte is None else f", {found.bits_per_byte:.3f} bits per byte"
            print_rank0(
                f"{seen:>14,} tokens  {name}: score {found.score:.3f}, chance {found.chance:.3f}{bits}"
            )
        self._tell(Event.EVAL_AFTER_ALL, state, logger)

    def _tell(self, event: Event, state: State, logger: Logger) -> None:
        for each in self.watching:
            each.run_event(event, state, logger)
