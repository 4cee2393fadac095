"""A program for tests: real Trainers, one after the other, whose ranks write down what each step did.

torchrun --nproc-per-node N recorded_run.py CONFIG OUT JOBS, where JOBS is a JSON list of
{"name", "resume": a checkpoint or null, "options": overrides}. OUT/NAME.RANK.json gets
{"samples": {step: [[source, sample id]]}, "losses": {step: the global batch's loss}}.
"""

from __future__ import annotations

import json
import os
import sys
from pathlib import Path
from typing import Any

from composer import Callback, Logger, State
from composer.utils import dist

from dbrx_train.checkpoint import folder
from dbrx_train.config import load
from dbrx_train.data.tokenizer import load_tokenizer
from dbrx_train.train import environment, run
from dbrx_train.train.trainer import build_trainer


class Recorder(Callback):  # type: ignore[misc]
    def __init__(self) -> None:
        self.samples: dict[int, Any] = {}
        self.losses: dict[int, float] = {}

    def batch_start(self, state: State, logger: Logger) -> None:
        batch = state.batch
        pairs = zip(batch["source"].tolist(), batch["sample_id"].tolist(), strict=True)
        assert len(batch["input_ids"]) == len(batch["source"])
        self.samples[state.timestamp.batch.value] = list(pairs)

    def batch_end(self, state: State, logger: Logger) -> None:
        self.losses[state.timestamp.batch.value - 1] = state.total_loss_dict["loss/train/total"]


def record(path: str, out: Path, name: str, resume: str | None, options: list[str]) -> None:
    config = load(path, [f"run_name={name}", f"folder={out}/{name}", *options])
    run.checkpoint_folder(config).mkdir(parents=True, exist_ok=True)
    store = run._open_store(config, resume=False)
    tokenizer = load_tokenizer(config.tokenizer.name, config.tokenizer.vocab_file)
    trainer = build_trainer(config, tokenizer, "cpu", store, 1e12)
    if resume is not None:
        run.resume(trainer, folder.read(Path(resume)))
    recorder = Recorder()
    trainer.state.callbacks.append(recorder)
    trainer.fit()
    trainer.close()
    seen = {"samples": recorder.samples, "losses": recorder.losses}
    (out / f"{name}.{dist.get_global_rank()}.json").write_text(json.dumps(seen))


if __name__ == "__main__":
    environment.join_ranks("cpu", load(sys.argv[1]).parallelism.timeout)
    for job in json.loads(sys.argv[3]):
        record(sys.argv[1], Path(sys.argv[2]), **job)
    dist.barrier()
    sys.stdout.flush()
    os._exit(0)  # gloo's own farewell hangs now and then
