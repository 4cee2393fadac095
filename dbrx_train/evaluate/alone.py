"""An evaluation of weights at rest, by command: tasks, records and a table."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from tqdm import tqdm

from dbrx_train.checkpoint.weights import load_model, open_weights, tokenizer_of
from dbrx_train.evaluate.benchmark import Benchmark
from dbrx_train.evaluate.gauntlet import Gauntlet, read_gauntlet
from dbrx_train.evaluate.long_table import by_position, draw, position_of, position_table
from dbrx_train.evaluate.outcomes import Result, result
from dbrx_train.evaluate.records import Records, fingerprint
from dbrx_train.evaluate.sandbox import open_sandbox
from dbrx_train.evaluate.table import table
from dbrx_train.evaluate.tasks import GAUNTLET, Task, select
from dbrx_train.model.quantize import quantize

__all__ = ["Asked", "evaluate"]


@dataclass(frozen=True)
class Asked:
    """What a user wants evaluated."""

    tasks: Sequence[str]
    """Files of tasks, ``gauntlet``, or labels."""
    data: Path | None = None
    """The folder of the tasks' data."""
    gauntlet: Path | None = None
    """The file that says how to aggregate; None: Gauntlet v0.3, where a task is in it."""
    json: Path | None = None
    limit: int | None = None
    max_seq_len: int | None = None
    int8: bool = False
    as_foundry: bool = False
    skip_missing: bool = False
    unsafe_code: bool = False
    """Run programs that the model writes without a sandbox."""
    picture: Path | None = None
    """Of scores by length and position, where tasks are of that kind."""


def evaluate(weights: Path, asked: Asked, aside: Callable[[str], None]) -> str:
    """The table of an evaluation of ``weights``. ``aside`` hears of what is passed over.

    Raises:
        ValueError: the weights, the tasks or their data are not as they must be; or ``asked.json`` holds
            another evaluation.
    """
    tasks = _there(select(asked.tasks, asked.data), asked, aside)
    gauntlet = _gauntlet(asked, tasks)
    if asked.picture and not _has_positions(tasks):
        raise ValueError("--picture: is of tasks by length and position; `data long-context` makes some")
    sandbox = open_sandbox(asked.unsafe_code) if any(task.is_code for task in tasks) else None
    opened = open_weights(weights, aside)
    tokenizer = tokenizer_of(opened)
    if tokenizer is None:
        raise ValueError(f"{weights}: its tokenizer is not DBRX's, which is the one known here")
    longest = opened.model.max_seq_len
    if asked.max_seq_len is not None and asked.max_seq_len > longest:
        raise ValueError(f"--max-seq-len: must be at most the model's {longest}, not {asked.max_seq_len}")
    benchmark = Benchmark(
        tasks,
        tokenizer,
        max_seq_len=asked.max_seq_len or longest,
        limit=asked.limit,
        as_foundry=asked.as_foundry,
        sandbox=sandbox,
    )
    model = load_model(opened).eval().to("cuda" if torch.cuda.is_available() else "cpu")
    if asked.int8:
        ids = torch.tensor([tokenizer.encode(" ".join(task.label for task in tasks))[:longest]])
        off = quantize(model, ids.to(next(model.parameters()).device))
        aside(f"int8: logits are off by {off:.2%} (root mean square)")
    options = {
        "int8": asked.int8,
        "limit": asked.limit,
        "max_seq_len": asked.max_seq_len or longest,
        "as_foundry": asked.as_foundry,
    }
    records = Records(asked.json, fingerprint(model), tasks, options) if asked.json else None
    known = records.known() if records else {}
    results = dict[str, Result]()
    with tqdm(total=sum(map(benchmark.size, benchmark.parts)), unit="example", disable=None) as bar:
        for part in benchmark.parts:
            bar.set_description(part.name)
            outcomes = []
            for outcome in benchmark.run(model, part, known):
                outcomes.append(outcome)
                if records and (outcome.task, outcome.category, outcome.index) not in known:
                    records.add(outcome)
                bar.update()
            results[part.name] = result(part.task, outcomes)
            if records:
                records.write(results, None)
    standings = gauntlet.standings(results, asked.as_foundry) if gauntlet else None
    if records:
        records.write(results, standings)
    shown = table(results, gauntlet, standings or ({}, {}))
    if grid := by_position(results):
        shown += f"\n\n{position_table(grid)}"
        if asked.picture:
            draw(grid, asked.picture)
    return shown


def _there(tasks: list[Task], asked: Asked, aside: Callable[[str], None]) -> list[Task]:
    """The tasks whose data is there."""
    missing = [task for task in tasks if not Path(task.dataset_uri).is_file()]
    if missing and not asked.skip_missing:
        more = f" and of {len(missing) - 1} more" if len(missing) > 1 else ""
        where = f" in {asked.data}" if asked.data else "; --data names the folder"
        raise ValueError(
            f"{missing[0].dataset_uri}: no such file{where} (data of {missing[0].label}"
            f"{more}); --skip-missing leaves such tasks out"
        )
    if missing:
        aside(f"without data, left out: {', '.join(task.label for task in missing)}")
    found = [task for task in tasks if task not in missing]
    if not found:
        raise ValueError("--tasks: of none of them the data is there; --data names the folder")
    return found


def _has_positions(tasks: Sequence[Task]) -> bool:
    return any(position_of(task.name(shots)) for task in tasks for shots in task.num_fewshot)


def _gauntlet(asked: Asked, tasks: Sequence[Task]) -> Gauntlet | None:
    if asked.gauntlet:
        return read_gauntlet(asked.gauntlet)
    usual = read_gauntlet(GAUNTLET)
    names = {task.name(shots) for task in tasks for shots in task.num_fewshot}
    return usual if names & set(usual.baselines) else None
