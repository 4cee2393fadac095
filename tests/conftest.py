"""Fixtures that several test files share: a small corpus, prepared once, and small runs over it."""

from __future__ import annotations

import os
from collections.abc import Iterator
from pathlib import Path

import pytest
from corpora import WORDS_VOCABULARY, prepare_sources, words
from warm import STEPS, Runs, Warm

os.environ.setdefault("MLFLOW_DISABLE_TELEMETRY", "true")


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption("--renew-golden", action="store_true", help="record anew what tests/golden guards")


@pytest.fixture(scope="session")
def workplace(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with two prepared sources, ``web`` and ``code``, and an MLflow store."""
    root = tmp_path_factory.mktemp("workplace")
    prepare_sources(root, {"web": 0, "code": 1}, seq_len=32, vocab_file=words(root))
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
  max_seq_len: 32, router_jitter: 0.1, vocab_size: {WORDS_VOCABULARY}}}
tokenizer: {{vocab_file: {workplace}/words.tiktoken}}
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


@pytest.fixture
def no_process_group() -> None:
    """Runs in this process, of other tests, leave theirs."""
    from torch import distributed

    if distributed.is_initialized():
        distributed.destroy_process_group()
