"""Engines that are not ours read an export, and say what we say: next-token log-probabilities, in float32.

Each may be installed for a Python of its own, which ``MLX_PYTHON`` and ``XLLAMACPP_PYTHON`` name;
``LLAMA_CPP`` is the folder of llama.cpp with ``convert_hf_to_gguf.py``.
"""

from __future__ import annotations

import json
import os
import random
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from dbrx_train import Dbrx, DbrxConfig
from dbrx_train.checkpoint.huggingface import export

pytestmark = pytest.mark.slow
LENGTHS = (1, 7, 40, 100)
LIKELIEST = 100  # of which the probabilities are compared

MLX = """
import json, pathlib, sys
import mlx.core as mx
import numpy as np
from mlx_lm.utils import load_model
mx.set_default_device(mx.cpu)
model, _ = load_model(pathlib.Path(sys.argv[1]))
for prompt, ids in json.load(sys.stdin):
    logits = np.array(model(mx.array([prompt]))[0, -1].astype(mx.float32), dtype=np.float64)
    print(json.dumps((logits - np.logaddexp.reduce(logits))[ids].tolist()))
"""

LLAMA_CPP = """
import json, sys
import xllamacpp as xlc
params = xlc.CommonParams()
params.model.path = sys.argv[1]
params.n_ctx, params.n_parallel, params.n_predict, params.warmup = 512, 1, 1, False
params.flash_attn_type = xlc.llama_flash_attn_type.LLAMA_FLASH_ATTN_TYPE_DISABLED
params.cache_type_k = params.cache_type_v = xlc.ggml_type.GGML_TYPE_F32
server = xlc.Server(params)
for prompt, ids in json.load(sys.stdin):
    asked = {"prompt": prompt, "n_predict": 1, "logprobs": 2 * len(ids), "temperature": 0.0}
    answer = server.handle_completions(asked)
    found = answer["choices"][0]["logprobs"]["content"][0]["top_logprobs"]
    found = {each["id"]: each["logprob"] for each in found}
    print(json.dumps([found.get(id) for id in ids]))
"""


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    shape = {"d_model": 64, "n_layers": 2, "n_heads": 4, "n_kv_heads": 2, "ffn_hidden_size": 96}
    model = Dbrx(DbrxConfig(**shape, num_experts=4, top_k=2, max_seq_len=256), seed=3)
    with torch.no_grad():
        model.lm_head.weight.mul_(20)  # so that tokens differ in probability
    path = tmp_path_factory.mktemp("engines")
    model.save_pretrained(path / "weights")
    export(path / "weights", path / "hf", torch.float32, print)
    return path / "hf"


def python_with(module: str, variable: str) -> str:
    """The interpreter that has an engine, or skip."""
    python = os.environ.get(variable, sys.executable)
    there = subprocess.run([python, "-c", f"import {module}"], capture_output=True, timeout=120)
    if there.returncode:
        pytest.skip(f"{module} is not installed; {variable} may name a Python that has it")
    return python


def agrees(folder: Path, python: str, script: str, weights: Path, normalizer: float = 1e-4) -> None:
    """Ask an engine for the log-probabilities of what we find likeliest after some prompts.

    ``normalizer``: by how much all of a prompt's may be off alike.
    """
    model, rng = Dbrx.from_pretrained(folder).eval(), random.Random(0)
    prompts = [[rng.randrange(100_000) for _ in range(length)] for length in LENGTHS]
    with torch.no_grad():
        logits = [model(torch.tensor([prompt])).logits[0, -1].double() for prompt in prompts]
    ours = [each.log_softmax(-1).topk(LIKELIEST) for each in logits]
    asked = json.dumps([(prompt, ids.tolist()) for prompt, (_, ids) in zip(prompts, ours, strict=True)])
    done = subprocess.run(
        [python, "-c", script, str(weights)], input=asked, capture_output=True, text=True, timeout=300
    )
    assert done.returncode == 0, done.stderr[-2000:]
    lines = [line for line in done.stdout.splitlines() if line.startswith("[")]
    assert len(lines) == len(prompts)
    for line, (log_probs, _) in zip(lines, ours, strict=True):
        assert log_probs.max() - log_probs.min() > 1
        difference = torch.tensor(json.loads(line), dtype=torch.float64) - log_probs
        assert (difference - difference.mean()).abs().max() < 1e-4
        assert difference.mean().abs() < normalizer


def test_mlx_reads_the_folder_as_it_is(folder: Path) -> None:
    agrees(folder, python_with("mlx_lm", "MLX_PYTHON"), MLX, folder)


def test_llama_cpp_reads_what_its_script_converts(folder: Path) -> None:
    python = python_with("xllamacpp", "XLLAMACPP_PYTHON")
    source = os.environ.get("LLAMA_CPP")
    if source is None:
        pytest.skip("LLAMA_CPP names no folder with llama.cpp's convert_hf_to_gguf.py")
    out = folder.parent / "model.gguf"
    command = [
        sys.executable,
        f"{source}/convert_hf_to_gguf.py",
        folder,
        "--outtype",
        "f32",
        "--outfile",
        out,
    ]
    done = subprocess.run([*command, "--outfile", out], capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr[-2000:]
    # It adds up the probabilities of 100,352 words in float32.
    agrees(folder, python, LLAMA_CPP, out, normalizer=1e-3)
