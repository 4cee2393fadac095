"""What tests/evaluate/foundry holds: small data sets, LLM Foundry's records of them, and their model."""

from __future__ import annotations

import json
from pathlib import Path

import torch
from safetensors import safe_open
from safetensors.torch import load_file

from dbrx_train import Dbrx, DbrxConfig

FOUNDRY = Path(__file__).parents[1] / "evaluate" / "foundry"


def golden_model() -> Dbrx:
    """The model of the records; its file has the rows of those words alone that are not all zero."""
    path = FOUNDRY / "model.safetensors"
    with safe_open(path, "pt") as file:
        config = DbrxConfig.from_dict(json.loads(file.metadata()["config"]))
    stored = load_file(path)
    used = stored.pop("used").long()
    for name in ("transformer.wte.weight", "lm_head.weight"):
        whole = torch.zeros(config.vocab_size, config.d_model)
        whole[used] = stored[name].float()
        stored[name] = whole
    model = Dbrx(config, seed=0)
    model.load_state_dict({name: tensor.float() for name, tensor in stored.items()})
    return model.eval()
