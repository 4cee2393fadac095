"""Stopped at any step and resumed on any world, a real run trains on what it would have trained on."""

from __future__ import annotations

import json
import signal
import subprocess
import sys
from pathlib import Path
from typing import Any

import mlflow
import pytest
import torch
from corpora import WORDS_VOCABULARY, prepare_sources, words
from paths import HELPERS
from tiny_run import saved_tensors
from warm import Warm

from dbrx_train.checkpoint import folder as folders
from dbrx_train.config import RunConfig, load
from dbrx_train.train.composer_model import ComposerDbrx
from dbrx_train.train.data import train_dataset
from dbrx_train.train.run import run

PROGRAM = str(HELPERS / "recorded_run.py")
STEPS = 22


@pytest.fixture(scope="module")
def recorded(workplace: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A YAML with all that may change in a run: a ramp, a growing batch, longer samples at the end."""
    root = tmp_path_factory.mktemp("recorded")
    prepare_sources(root, {"long-web": 10, "long-code": 11}, seq_len=64, documents=40, vocab_file=words(root))
    path = root / "run.yaml"
    path.write_text(f"""
run_name: recorded
folder: {root}/recorded
max_duration: {STEPS}ba
model: {{d_model: 16, n_layers: 1, n_heads: 2, n_kv_heads: 1, ffn_hidden_size: 28, num_experts: 4, top_k: 2,
  max_seq_len: 64, vocab_size: {WORDS_VOCABULARY}}}
tokenizer: {{vocab_file: {root}/words.tiktoken}}
data:
  seq_len: 32
  canonical_nodes: 2
  num_workers: 0
  sources:
    web: {{local: {workplace}/web}}
    code: {{local: {workplace}/code}}
    long-web: {{local: {root}/long-web}}
    long-code: {{local: {root}/long-code}}
  mix:
    - {{at: 0tok, weights: {{web: 0.9, code: 0.1}}}}
    - {{at: 8ba, weights: {{web: 0.9, code: 0.1}}}}
    - {{at: 14ba, weights: {{web: 0.5, code: 0.5}}, interpolation: linear}}
    - {{at: 18ba, weights: {{long-web: 0.5, long-code: 0.5}}, seq_len: 64}}
optimization:
  global_batch_size: 8
  batch_size_warmup: [{{until: 4ba, global_batch_size: 4}}]
  microbatch_size: 2
checkpoints: {{interval: 1ba, keep: 100}}
logging: {{mlflow_uri: "sqlite:///{root}/mlruns.db", progress: false, peak_flops: 1.0e+12}}
evaluation: {{max_samples: 0}}
""")
    return path


def train(warm: Warm, path: Path, ranks: int, jobs: list[dict[str, Any]]) -> None:
    warm.torchrun(ranks, PROGRAM, str(path), str(path.parent), json.dumps(jobs))


def served(path: Path, name: str, ranks: int) -> dict[int, list[list[int]]]:
    """Step -> (source, sample) of its global batch, in order."""
    files = [path.parent / f"{name}.{rank}.json" for rank in range(ranks)]
    parts = [json.loads(file.read_text())["samples"] for file in files]
    assert all(part.keys() == parts[0].keys() for part in parts)
    return {int(step): [pair for part in parts for pair in part[step]] for step in parts[0]}


def final_weights(path: Path, name: str) -> dict[str, torch.Tensor]:
    return saved_tensors(path.parent / name / "checkpoints" / f"ba{STEPS}")


def epoch_ends(config: RunConfig) -> int:
    """The step whose batch holds the last sample of the first source's first epoch."""
    data, clock = train_dataset(config), config.clock
    for step in range(STEPS):
        samples = int(clock.convert(step + 1, "ba", "sp"))
        if data.schedule.totals(samples // 2)[0] >= data.sizes["web"]:
            return step
    raise AssertionError("the run is too short for an epoch of web")


@pytest.mark.slow
def test_every_stop_and_world_goes_on_with_the_samples_of_the_uninterrupted_run(
    recorded: Path, warm: Warm
) -> None:
    config = load(recorded)
    train(warm, recorded, 1, [{"name": "whole", "resume": None, "options": []}])
    whole = served(recorded, "whole", 1)
    assert [len(whole[step]) for step in range(STEPS)] == [4] * 4 + [8] * 14 + [4] * 4
    schedule = train_dataset(config).schedule
    for step in range(STEPS):
        before, after = (int(config.clock.convert(s, "ba", "sp")) // 2 for s in (step, step + 1))
        counts = (schedule.totals(after) - schedule.totals(before)).tolist()
        assert [sum(source == s for source, _ in whole[step]) for s in range(4)] == counts

    # In the warm-up, at its end, amid the ramp, around an epoch's end, at the new length's beginning, within.
    stops = [2, 4, 11, epoch_ends(config), epoch_ends(config) + 1, 18, 20]
    assert all(8 < stop < 18 for stop in stops[3:5])
    came_from = "whole"
    weights = final_weights(recorded, "whole")
    for ranks, workers, mesh in (
        (2, 2, ["parallelism.expert=2"]),
        (4, 0, ["parallelism.replicate=2", "parallelism.expert=2"]),
        (1, 1, []),
    ):
        jobs = [
            {
                "name": f"on{ranks}x{workers}from{stop}",
                "resume": str(recorded.parent / came_from / "checkpoints" / f"ba{stop}"),
                # The next world resumes from what the first of these saves.
                "options": [
                    f"data.num_workers={workers}",
                    f"checkpoints.interval={'1ba' if stop == stops[0] else '1dur'}",
                    *mesh,
                ],
            }
            for stop in stops
        ]
        train(warm, recorded, ranks, jobs)
        for stop, job in zip(stops, jobs, strict=True):
            following = served(recorded, str(job["name"]), ranks)
            assert following == {step: whole[step] for step in range(stop, STEPS)}, job
            torch.testing.assert_close(
                final_weights(recorded, str(job["name"])), weights, rtol=1e-3, atol=1e-5
            )
        came_from = f"on{ranks}x{workers}from{stops[0]}"
        stops = stops[2:]


def noting(forward: Any, shapes: list[tuple[int, ...]]) -> Any:
    def noted(model: ComposerDbrx, batch: dict[str, torch.Tensor]) -> Any:
        shapes.append(tuple(batch["input_ids"].shape))
        return forward(model, batch)

    return noted


@pytest.mark.slow
def test_what_a_run_logs_follows_its_steps(recorded: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    name = "logged"
    options = [f"run_name={name}", f"folder={recorded.parent}/{name}", "logging.interval=1ba"]
    options += ["evaluation.max_samples=4", "evaluation.batch_size=2", "evaluation.interval=1dur"]
    config = load(recorded, options)
    monkeypatch.setattr(ComposerDbrx, "forward", noting(ComposerDbrx.forward, shapes := []))
    run(config)
    # The first evaluation: batches of two samples of 32 tokens or one of 64, of every source.
    assert shapes[:12] == [(2, 32)] * 4 + [(1, 64)] * 8
    # Microbatches of 64 tokens: two or one samples.
    assert shapes[12:-12] == [(2, 32)] * (4 * 2 + 14 * 4) + [(1, 64)] * 4 * 4
    end = folders.read(recorded.parent / name / "checkpoints" / f"ba{STEPS}")
    seen = 4 * 4 * 32 + 18 * 8 * 32
    assert config.clock.total_tokens == seen == end.tokens
    client = mlflow.MlflowClient(f"sqlite:///{recorded.parent}/mlruns.db")
    experiment = client.get_experiment_by_name("dbrx-train")
    assert experiment is not None
    (found,) = client.search_runs([experiment.experiment_id], f"tags.run_name = '{name}'")

    def history(metric: str) -> list[float]:
        return [m.value for m in client.get_metric_history(found.info.run_id, metric)]

    tokens = [history(f"mix/{source}/tokens") for source in ("web", "code", "long-web", "long-code")]
    assert [sum(step) for step in zip(*tokens, strict=True)] == [
        config.clock.convert(step + 1, "ba", "tok") for step in range(STEPS)
    ]
    assert history("mix/long-web/served")[-1] == 0.5
    ramp = history("mix/web/asked")[7:14]
    assert ramp == pytest.approx([0.9 - 0.4 * i / 6 for i in range(7)])
    assert len(history("loss/train/cross_entropy")) == STEPS


@pytest.mark.slow
def test_after_sigkill_the_same_command_trains_on_the_same_samples(recorded: Path, warm: Warm) -> None:
    """The recorder is not there when a process is killed: the weights at the end stand for the samples."""
    name = "killed"
    options = ["checkpoints.interval=4ba", f"run_name={name}", f"folder={recorded.parent}/{name}"]
    command = ["train", str(recorded), *options, "data.num_workers=2"]
    # With the loader's workers, amid the ramp
    kill = {"kind": "deed", "at": "before_forward", "step": 10, "deed": f"group {int(signal.SIGKILL)}"}
    assert warm(*command, faults=[kill])[0] == -signal.SIGKILL
    assert folders.saved(recorded.parent / name / "checkpoints")[0].name == "ba8"
    code, said = warm(*command)
    assert code == 0, said
    assert "/ba8, after " in said
    straight = [f"run_name={name}-not", f"folder={recorded.parent}/{name}-not", "checkpoints.interval=1dur"]
    code, said = warm("train", str(recorded), *straight)
    assert code == 0, said
    killed, whole = (final_weights(recorded, run) for run in (name, f"{name}-not"))
    assert killed.keys() == whole.keys()
    assert all(torch.equal(killed[key], whole[key]) for key in whole)


def test_the_table_shows_every_change_before_training(recorded: Path, tmp_path: Path) -> None:
    command = [str(Path(sys.executable).parent / "dbrx-train"), "data", "mix", str(recorded)]
    done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, timeout=100)
    assert done.returncode == 0, done.stderr
    rows = [line.split() for line in done.stdout.splitlines() if line.strip()[:1].isdigit()]
    shown = {int(row[0].replace(",", "")): " ".join(row[2:5]) for row in rows}
    assert {0: "4 x 32", 512: "8 x 32", 512 + 14 * 256: "4 x 64"}.items() <= shown.items()
    assert max(shown) == 512 + 18 * 256
    other = [*command, "data.sources.web.local=" + str(recorded.parent / "long-web")]
    done = subprocess.run(other, cwd=tmp_path, capture_output=True, text=True, timeout=100)
    assert done.returncode == 2
    assert "prepared with samples of 64 tokens, but the run asks for 32" in done.stderr
