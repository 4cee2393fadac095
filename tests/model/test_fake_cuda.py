"""What a GPU would be asked to do, seen on fake CUDA tensors: a tensor that is left on the CPU, a number that
the host waits for, or a mask of all pairs fails here, without a GPU."""

from __future__ import annotations

import json
import subprocess
import sys
from typing import Any

import fake_cuda
import fake_cuda_cases
import pytest
from paths import HELPERS, ROOT

Launches = dict[str, int]


@pytest.fixture(scope="module")
def found(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    """What each case launched; the traceback of those that failed."""
    variables = fake_cuda.environment(tmp_path_factory.mktemp("driver"))
    if variables is None:
        pytest.skip("torch is built for CUDA, and there is no C compiler to make a driver that does nothing")
    done = subprocess.run(
        [sys.executable, str(HELPERS / "fake_cuda_cases.py")],
        env=variables | {"PYTHONPATH": f"{ROOT}:{HELPERS}", "OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
        timeout=300,
    )
    assert done.returncode == 0, done.stderr[-4000:]
    return {line["case"]: line for line in map(json.loads, done.stdout.splitlines())}


@pytest.mark.parametrize("name", fake_cuda_cases.CASES)
def test_every_tensor_is_on_the_gpu_and_the_host_waits_for_none(name: str, found: dict[str, Any]) -> None:
    assert "error" not in found[name], found[name]["error"]


def launches(found: dict[str, Any], name: str) -> Launches:
    counts: Launches = found[name]["found"]["launches"]
    return counts


def attention(counts: Launches) -> Launches:
    """Kernels of attention's forward pass, those of variable lengths under one name."""
    names = {"torch_attn::_varlen_attn": "_flash_attention_forward"}
    return {
        names.get(name, name): count
        for name, count in counts.items()
        if ("attention" in name or "varlen_attn" in name) and "backward" not in name
    }


@pytest.mark.parametrize("name", ["packed_documents_bf16", "long_samples", "dense", "log_probabilities"])
def test_packed_documents_are_one_kernel_a_layer_at_every_length(name: str, found: dict[str, Any]) -> None:
    assert attention(launches(found, name)) == {"_flash_attention_forward": 2}
    assert found[name]["found"]["largest_mask"] == 0


@pytest.mark.parametrize(("what", "times"), [("full", 4), ("selective", 2), ("norm_attn_norm", 4)])
def test_what_is_kept_is_not_attended_to_again(what: str, times: int, found: dict[str, Any]) -> None:
    assert attention(launches(found, f"recomputed_{what}")) == {"_flash_attention_forward": times}


@pytest.mark.parametrize(
    ("what", "again"), [("full", 2), ("full_keep_dispatched", 2), ("selective", 0), ("norm_attn_norm", 0)]
)
def test_the_experts_answers_are_not_computed_again(what: str, again: int, found: dict[str, Any]) -> None:
    assert launches(found, f"recomputed_{what}")["grouped product"] == 2 * (9 + again)


def test_without_documents_heads_are_shared(found: dict[str, Any]) -> None:
    assert attention(launches(found, "without_documents")) == {"_scaled_dot_product_flash_attention": 2}


def test_float32_falls_to_no_plain_products(found: dict[str, Any]) -> None:
    for name in ("packed_documents_float32", "dense_float32"):
        assert attention(launches(found, name)) == {"_scaled_dot_product_efficient_attention": 2}


def test_a_dense_model_needs_no_grouped_products(found: dict[str, Any]) -> None:
    counts = launches(found, "dense")
    assert "grouped product" not in counts
    assert counts["mm"] > launches(found, "packed_documents_bf16")["mm"]


# docs/performance.md lists them. Fewer is better: then lower these, and the list.
@pytest.mark.parametrize(
    ("name", "most", "gigabytes"), [("layer_of_dbrx", 72, 75), ("block_of_dbrx", 153, 83)]
)
def test_a_step_launches_and_moves_no_more(
    name: str, most: int, gigabytes: float, found: dict[str, Any]
) -> None:
    step = found[name]["found"]
    assert sum(step["launches"].values()) <= most, step["launches"]
    assert step["bytes"] / 1e9 <= gigabytes
    assert step["launches"]["grouped product"] == 9
