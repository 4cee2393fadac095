"""A run of a tiny DBRX, and what it left behind."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from corpora import WORDS_VOCABULARY


def run_yaml(root: Path, folder: Path, name: str) -> Path:
    """A run of 8 optimizer steps of a tiny DBRX over the workplace's sources."""
    path = folder / f"{name}.yaml"
    path.write_text(f"""
run_name: {name}
folder: {folder}/{name}
max_duration: 8ba
model: {{d_model: 32, n_layers: 2, n_heads: 4, n_kv_heads: 2, ffn_hidden_size: 56, max_seq_len: 64,
  vocab_size: {WORDS_VOCABULARY}}}
tokenizer: {{vocab_file: {root}/words.tiktoken}}
data:
  seq_len: 32
  num_workers: 0
  sources: {{web: {{local: {root}/web}}, code: {{local: {root}/code}}}}
  mix:
    - {{at: 0tok, weights: {{web: 0.75, code: 0.25}}}}
    - {{at: 0.75dur, weights: {{web: 0.25, code: 0.75}}, interpolation: linear}}
optimization:
  global_batch_size: 4
  microbatch_size: 2
  optimizer: {{lr: 1.0e-2}}
  learning_rate: {{warmup: 2ba}}
checkpoints: {{interval: 2ba, keep: 3}}
logging: {{mlflow_uri: "sqlite:///{root}/mlruns.db", interval: 2ba, progress: false, peak_flops: 1.0e+12}}
evaluation: {{interval: 4ba, batch_size: 2, max_samples: 4}}
""")
    return path


def saved_tensors(checkpoint: Path) -> dict[str, torch.Tensor]:
    """The whole model and optimizer state in a checkpoint, by name."""
    from dbrx_train.checkpoint.tensors import Reader

    reader = Reader(checkpoint)
    found = {name: torch.empty(shape, dtype=dtype) for name, (shape, dtype) in reader.shapes.items()}
    reader.read(found)
    return {name: tensor for name, tensor in found.items() if not name.startswith("random.")}


def mlflow_run(root: Path, name: str) -> Any:
    import mlflow

    client = mlflow.MlflowClient(f"sqlite:///{root}/mlruns.db")
    experiment = client.get_experiment_by_name("dbrx-train")
    assert experiment is not None
    (found,) = client.search_runs([experiment.experiment_id], f"tags.run_name = '{name}'")
    return client, found
