"""Moments at which commands are interrupted, and closes that fail, with what the screen then says.

``docs/troubleshooting.md`` has the table, and ``tests/faults/test_exits.py`` drives it.
"""

from __future__ import annotations

import os
import signal
import sys
from dataclasses import dataclass, field
from typing import Any

INT, TERM = signal.SIGINT, signal.SIGTERM
NAMES = {INT: "Ctrl-C", TERM: "SIGTERM"}
TRAIN = "dbrx_train.train."
NOTHING, SAVED = "the beginning: nothing was saved yet", "…/checkpoints/ba"


@dataclass(frozen=True)
class Moment:
    """A moment of a command.

    Attributes:
        name: what is being done, for a reader.
        command: the command, for a reader.
        signals: what it is sent, one at a time.
        codes: the exit code after each.
        line: the last line on the screen; NAME stands for the signal's.
        call: the fault's function, and further keys of it; of a cold process, a module that is imported.
        options: further arguments.
    """

    name: str
    command: str
    signals: tuple[int, ...]
    codes: tuple[int, ...]
    line: str
    call: str
    more: dict[str, Any] = field(default_factory=dict)
    options: tuple[str, ...] = ()


GOES_ON = "dbrx-train: interrupted (NAME); the same command goes on"
INTERRUPTED = "dbrx-train: interrupted (NAME)"
ENDS = "dbrx-train: NAME: all is saved, and it ends; a second one ends it at once"


def stopped(where: str) -> str:
    return f"stopped (NAME); the same command goes on from {where}"


def train(
    name: str, number: int, call: str, where: str, *options: str, code: int | None = None, **more: Any
) -> Moment:
    code = {INT: 130, TERM: 75}[signal.Signals(number)] if code is None else code
    return Moment(name, "train", (number,), (code,), stopped(where), call, more, options)


COLD = [
    Moment("the first import", "train", (INT, TERM), (130, 143), INTERRUPTED, "typer"),
    Moment("the imports of the configuration", "train", (TERM,), (75,), GOES_ON, "omegaconf"),
    Moment("the import of torch", "train", (INT,), (130,), GOES_ON, "torch"),
    Moment("the import of Composer", "train", (TERM,), (75,), GOES_ON, "composer"),
    Moment("the import of MLflow", "train", (INT,), (130,), GOES_ON, "mlflow"),
]

TRAINING = [
    Moment("reading the configuration", "train", (TERM,), (75,), GOES_ON, "dbrx_train.config:load"),
    train("joining the other ranks", INT, f"{TRAIN}environment:join_ranks", NOTHING),
    train("checking the data", TERM, f"{TRAIN}run:check_sources", NOTHING),
    train("taking the run's folder", INT, "dbrx_train.lease:Lease.__enter__", NOTHING),
    train("opening MLflow's store", INT, f"{TRAIN}run:_open_store", NOTHING),
    train("building the model", TERM, f"{TRAIN}trainer:build_model", NOTHING),
    train(
        "the evaluation before the first step",
        TERM,
        "composer:Trainer.eval",
        NOTHING,
        "evaluation.max_samples=1",
    ),
    train("the first step", INT, "dbrx_train.model.decoder:Dbrx.forward", f"{SAVED}1"),
    train("between two microbatches", TERM, "dbrx_train.model.decoder:Dbrx.forward", f"{SAVED}2", time=4),
    train("a save", INT, f"{TRAIN}callbacks.checkpoints:write", f"{SAVED}1"),
    train(
        "a save beside training",
        TERM,
        f"{TRAIN}callbacks.checkpoints:write",
        f"{SAVED}[12]",
        "checkpoints.asynchronous=true",
    ),
    train(
        "an evaluation",
        INT,
        "composer:Trainer._eval_loop",
        f"{SAVED}1",
        "evaluation.max_samples=1",
        "evaluation.interval=1ba",
        "evaluation.at_start=false",
    ),
    train("an export", TERM, f"{TRAIN}exports:export", f"{SAVED}[123]", "checkpoints.export.interval=1ba"),
]
ENDED = [
    Moment("the last figures and the picture", "train", (INT,), (0,), ENDS, f"{TRAIN}run:_report"),
    Moment("closing what trained", "train", (TERM,), (0,), ENDS, "composer:Trainer.close"),
    Moment(
        "closing MLflow's run", "train", (INT,), (0,), ENDS, f"{TRAIN}tracking.mlflow:MLflowStore.post_close"
    ),
    Moment("after all that", "train", (INT,), (130,), GOES_ON, "dbrx_train.exits:_flushed"),
]
RESUMING = train("loading the checkpoint that it goes on from", INT, f"{TRAIN}run:resume", f"{SAVED}3")

PREPARE = "dbrx_train.data.prepare."
OTHERS = [
    Moment(
        "looking at the input",
        "data prepare",
        (INT, TERM),
        (130, 75),
        GOES_ON,
        f"{PREPARE}pipeline:plan_parts",
    ),
    Moment("tokenizing", "data prepare", (INT, TERM), (130, 75), GOES_ON, f"{PREPARE}workers:wait"),
    Moment(
        "writing the manifest",
        "data prepare",
        (INT, TERM),
        (130, 75),
        GOES_ON,
        f"{PREPARE}pipeline:write_manifest",
    ),
    Moment(
        "reading a sample",
        "data inspect",
        (INT,),
        (130,),
        INTERRUPTED,
        "dbrx_train.data.inspect:inspect",
    ),
    Moment("drawing", "data mix", (TERM,), (143,), INTERRUPTED, "dbrx_train.data.mix.plots:draw"),
    Moment("loading", "generate", (TERM,), (143,), INTERRUPTED, "dbrx_train.evaluate.text:load_model"),
    Moment(
        "amid the text",
        "generate",
        (INT,),
        (130,),
        INTERRUPTED,
        "dbrx_train.model.decoder:Dbrx.forward",
        {"time": 3},
    ),
    Moment("a batch", "eval", (INT, TERM), (130, 143), INTERRUPTED, "dbrx_train.model.decoder:Dbrx.forward"),
    Moment("collecting the numbers", "report", (INT,), (130,), INTERRUPTED, "dbrx_train.report:read"),
    Moment(
        "writing a file",
        "checkpoint export",
        (INT, TERM),
        (130, 143),
        INTERRUPTED,
        "dbrx_train.model.hf.files:map_file",
    ),
    Moment(
        "writing the file",
        "checkpoint consolidate",
        (TERM,),
        (143,),
        INTERRUPTED,
        "dbrx_train.checkpoint.weights:map_file",
    ),
    Moment(
        "hashing",
        "checkpoint verify",
        (INT,),
        (130,),
        INTERRUPTED,
        "dbrx_train.checkpoint.verify:verify",
    ),
]

CLOSES = {
    "MLflow's run cannot be closed": (
        f"{TRAIN}tracking.mlflow:MLflowStore.post_close",
        "Error running MLflowStore.post_close(). (what a test raises)",
    ),
    "a callback cannot be closed": (
        f"{TRAIN}callbacks.checkpoints:Checkpoints.close",
        "Error running Checkpoints.close(). Skipping Checkpoints.post_close(). (what a test raises)",
    ),
    "the Trainer cannot be closed": (
        "composer:Trainer.close",
        "dbrx-train: warning: not all was closed (what a test raises)",
    ),
    "MLflow does not take the events": (
        f"{TRAIN}run:_keep_events",
        "dbrx-train: warning: MLflow does not keep events.jsonl (what a test raises)",
    ),
    "the picture cannot be drawn": (
        f"{TRAIN}tracking.plots:draw",
        "dbrx-train: warning: no picture of the run, or its last figures (what a test raises)",
    ),
    "an export fails": (
        f"{TRAIN}exports:export",
        "dbrx-train: warning: checkpoints.export: … could not be written (what a test raises)",
    ),
}
"""What fails while a run ends, which otherwise went well: its function, and the line that says so."""


class _Interrupt:
    """An importer that finds nothing, but sends a signal when a module is looked for."""

    def __init__(self, module: str, number: int) -> None:
        self.module, self.number = module, number

    def find_spec(self, name: str, path: Any = None, target: Any = None) -> None:
        if name == self.module:
            os.kill(os.getpid(), self.number)


if __name__ == "__main__":  # moments.py MODULE SIGNAL ARGUMENTS...: dbrx-train, interrupted amid an import
    signal.signal(signal.SIGINT, signal.default_int_handler)  # which a shell's & has had ignored
    _, module, number, *arguments = sys.argv
    sys.meta_path.insert(0, _Interrupt(module, int(number)))  # type: ignore[arg-type]
    sys.argv = ["dbrx-train", *arguments]
    from dbrx_train.__main__ import main

    main()
