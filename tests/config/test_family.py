"""The configurations that ship describe the models that they are named after."""

from pathlib import Path

import pytest
import torch
from paths import ROOT, RUNS

from dbrx_train.config import load
from dbrx_train.model.decoder import Dbrx

CONFIGS = ROOT / "configs"

# name -> billions of parameters, of active ones, and whether the input embedding is counted in these
FAMILY = {
    "dbrx-9b": (9.17, 2.83, (True, True)),
    "dbrx-18b": (18.6, 5.5, (True, True)),
    "dbrx-35b": (35.7, 10.3, (True, True)),
    "dbrx-73b": (73.5, 20.7, (True, True)),
    "dbrx-132b": (131.6, 36.5, (True, True)),
    "moe-a": (7.71, 2.22, (True, False)),
    "moe-b": (23.5, 6.56, (True, False)),
    "dense-a": (6.69, 6.69, (False, False)),
}


def shown(count: int, figure: float) -> float:
    """``count`` in billions, to as many decimals as ``figure`` is given with."""
    return round(count / 1e9, len(str(figure).split(".")[1]))


@pytest.mark.parametrize("name", FAMILY)
def test_family_has_its_published_sizes(name: str) -> None:
    config = load(CONFIGS / "pretrain" / f"{name}.yaml").model
    total, active, counts_embedding = FAMILY[name]
    embedding = config.vocab_size * config.d_model
    assert shown(config.num_params - (0 if counts_embedding[0] else embedding), total) == total
    counted = config.num_active_params if counts_embedding[1] else config.num_active_params_non_embedding
    assert shown(counted, active) == active
    with torch.device("meta"):
        model = Dbrx(config)
    assert sum(p.numel() for p in model.parameters()) == config.num_params


def test_132b_is_the_released_model_to_the_parameter() -> None:
    config = load(CONFIGS / "pretrain" / "dbrx-132b.yaml").model
    assert config.num_params == 131_596_523_520
    with torch.device("meta"):
        state = Dbrx(config).state_dict()
    assert len(state) == 323
    assert tuple(state["transformer.blocks.39.ffn.experts.mlp.w2"].shape) == (172_032, 6144)


@pytest.mark.parametrize("path", RUNS, ids=lambda p: p.stem)
def test_every_configuration_that_ships_is_valid(path: Path) -> None:
    assert load(path).run_name == path.stem
