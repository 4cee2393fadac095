"""Weights as small as can be, that a command can read."""

from __future__ import annotations

from pathlib import Path

from dbrx_train import Dbrx, DbrxConfig


def save_tiny_weights(folder: Path, max_seq_len: int) -> Path:
    """A Hugging Face folder of a model of so many tokens."""
    shape = {"d_model": 8, "n_layers": 1, "n_heads": 2, "n_kv_heads": 1, "ffn_hidden_size": 14}
    config = DbrxConfig(**shape, num_experts=2, top_k=1, max_seq_len=max_seq_len)
    Dbrx(config, seed=0).save_pretrained(folder)
    return folder
