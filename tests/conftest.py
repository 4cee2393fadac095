"""What several test files share: a small corpus, prepared once, and a small run over it."""

from __future__ import annotations

import json
import os
import random
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from ranks import free_port
from warm import STEPS, Runs, Warm

os.environ.setdefault("MLFLOW_DISABLE_TELEMETRY", "true")

WORDS = [
    "the",
    "model",
    "reads",
    "a",
    "token",
    "and",
    "then",
    "another",
    "token",
    "until",
    "the",
    "text",
    "of",
    "the",
    "source",
    "is",
    "at",
    "its",
    "end",
]


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption("--renew-golden", action="store_true", help="record anew what tests/golden guards")


def torchrun(ranks: int, *arguments: str) -> str:
    """What a program prints that torchrun starts on so many ranks of this machine."""
    launch = [sys.executable, "-m", "torch.distributed.run", f"--nproc-per-node={ranks}"]
    done = subprocess.run(
        [*launch, f"--master-port={free_port()}", *arguments],
        env={**os.environ, "OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
        timeout=400,
    )
    assert done.returncode == 0, done.stderr[-9000:]
    return done.stdout


def saved_tensors(checkpoint: Path) -> dict[str, torch.Tensor]:
    """The whole model and optimizer state in a checkpoint, by name."""
    from dbrx_train.checkpoint.tensors import Reader

    reader = Reader(checkpoint)
    found = {name: torch.empty(shape, dtype=dtype) for name, (shape, dtype) in reader.shapes.items()}
    reader.read(found)
    return {name: tensor for name, tensor in found.items() if not name.startswith("random.")}


def write_corpus(folder: Path, seed: int, documents: int = 60) -> Path:
    """Text files of random sentences, enough for a few dozen samples of 32 tokens."""
    generator = random.Random(seed)
    folder.mkdir(parents=True)
    for i in range(documents):
        words = generator.choices(WORDS, k=generator.randint(20, 90))
        (folder / f"{i:03d}.txt").write_text(" ".join(words) + ".\n")
    return folder


def prepare_sources(root: Path, seeds: dict[str, int], seq_len: int, documents: int = 60) -> None:
    """Sources of random sentences in ``root``, by name, each from its seed."""
    from dbrx_train.data.prepare.pipeline import prepare

    for name, seed in seeds.items():
        text = write_corpus(root / "text" / name, seed, documents)
        prepare([str(text)], str(root / name), seq_len=seq_len, val_fraction=0.2, processes=1, progress=False)


def prepare_pairs(root: Path) -> Path:
    """``root``/pairs: prepared preferences for one word over another."""
    from dbrx_train.data.prepare.conversations import ChatFormat
    from dbrx_train.data.prepare.pipeline import prepare

    pick = random.Random(0)
    words = ["the", "model", "reads", "a", "token"]
    rows = [
        {
            "prompt": " ".join(pick.choices(words, k=15 if i % 3 else 1)),
            "chosen": f"yes {i % 7}",
            "rejected": f"no {i % 5}",
        }
        for i in range(80)
    ]
    path = root / "pairs.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    form = ChatFormat(preferences=True)
    prepare([str(path)], str(root / "pairs"), seq_len=64, val_fraction=0.2, processes=1, chat=form)
    return root / "pairs"


@pytest.fixture(scope="session")
def workplace(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with two prepared sources, ``web`` and ``code``, and an MLflow store."""
    root = tmp_path_factory.mktemp("workplace")
    prepare_sources(root, {"web": 0, "code": 1}, seq_len=32)
    return root


@pytest.fixture(scope="session")
def warm(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Warm]:
    """Runs commands of dbrx-train, to which something may happen."""
    made = Warm(tmp_path_factory.mktemp("warm"))
    yield made
    made.close()


@pytest.fixture(scope="session")
def runs(warm: Warm, workplace: Path, tmp_path_factory: pytest.TempPathFactory) -> Runs:
    """Tiny runs, with one named ``whole`` that nothing happened to."""
    root = tmp_path_factory.mktemp("faults")
    path = root / "run.yaml"
    path.write_text(f"""
run_name: any
folder: {root}/${{run_name}}
max_duration: {STEPS}ba
model: {{d_model: 8, n_layers: 1, n_heads: 2, n_kv_heads: 1, ffn_hidden_size: 14, num_experts: 4, top_k: 2,
  max_seq_len: 32, router_jitter: 0.1}}
data:
  seq_len: 32
  num_workers: 0
  sources: {{web: {{local: {workplace}/web}}, code: {{local: {workplace}/code}}}}
optimization: {{global_batch_size: 4, microbatch_size: 2, optimizer: {{lr: 1.0e-2}}}}
checkpoints: {{interval: 1ba, keep: 1}}
logging: {{mlflow_uri: "sqlite:///{root}/mlruns.db", interval: 2ba, progress: false, peak_flops: 1.0e+12}}
evaluation: {{max_samples: 0}}
""")
    made = Runs(warm, path)
    code, said = made("whole")
    assert code == 0, said
    return made


def run_yaml(root: Path, folder: Path, name: str) -> Path:
    """A run of 8 optimizer steps of a tiny DBRX over the workplace's sources."""
    path = folder / f"{name}.yaml"
    path.write_text(f"""
run_name: {name}
folder: {folder}/{name}
max_duration: 8ba
model: {{d_model: 32, n_layers: 2, n_heads: 4, n_kv_heads: 2, ffn_hidden_size: 56, max_seq_len: 64}}
data:
  seq_len: 32
  num_workers: 0
  sources: {{web: {{local: {root}/web}}, code: {{local: {root}/code}}}}
  mix:
    - {{at: 0tok, weights: {{web: 0.75, code: 0.25}}}}
    - {{at: 0.75dur, weights: {{web: 0.25, code: 0.75}}, reach: linear}}
optimization:
  global_batch_size: 4
  microbatch_size: 2
  optimizer: {{lr: 1.0e-2}}
  learning_rate: {{warmup: 2ba}}
checkpoints: {{interval: 2ba, keep: 3}}
logging: {{mlflow_uri: "sqlite:///{root}/mlruns.db", interval: 2ba, progress: false}}
evaluation: {{interval: 4ba, batch_size: 2, max_samples: 4}}
""")
    return path
