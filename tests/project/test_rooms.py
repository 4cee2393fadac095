"""The arrows between the rooms, and what an import costs."""

import subprocess
import sys
from pathlib import Path

import pytest
from paths import ROOT


def python(code: str) -> str:
    done = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, timeout=120, check=True
    )
    return done.stdout.strip()


def test_import_contracts_hold() -> None:
    done = subprocess.run(
        [Path(sys.executable).parent / "lint-imports", "--no-cache"],
        cwd=ROOT,
        capture_output=True,
        text=True,
        timeout=120,
    )
    assert done.returncode == 0, done.stdout


@pytest.mark.parametrize(
    "module", ["dbrx_train", "dbrx_train.cli", "dbrx_train.config", "dbrx_train.data.mix.schedule"]
)
def test_light_modules_import_nothing_heavy(module: str) -> None:
    heavy = (
        "{'torch', 'composer', 'streaming', 'mlflow', 'tiktoken', 'pyarrow', 'transformers', 'matplotlib'}"
    )
    assert python(f"import sys, {module}; print(sorted({heavy} & set(sys.modules)))") == "[]"


def test_the_model_needs_torch_alone() -> None:
    absent = ["composer", "streaming", "mlflow", "tiktoken", "omegaconf"]
    allowed = f"import sys; sys.modules.update(dict.fromkeys({absent}))"
    names = "from dbrx_train import Dbrx, DbrxConfig, MoE"
    shape = (
        "d_model=32, n_layers=1, n_heads=2, n_kv_heads=1, ffn_hidden_size=48, vocab_size=64, max_seq_len=8"
    )
    use = f"import torch; print(tuple(Dbrx(DbrxConfig({shape}))(torch.ones(1, 3).long()).logits.shape))"
    assert python(f"{allowed}\n{names}\n{use}") == "(1, 3, 64)"


def test_unknown_names_are_attribute_errors() -> None:
    import dbrx_train

    assert set(dbrx_train.__all__) <= set(dir(dbrx_train))
    with pytest.raises(AttributeError, match="no attribute 'Dbrxx'"):
        dbrx_train.Dbrxx  # noqa: B018
