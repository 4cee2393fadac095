#!/usr/bin/env bash
# The checks that need a GPU, on a machine that has torch, pytest and omegaconf: bash scripts/gpu_check.sh
set -euo pipefail
cd "$(dirname "$0")/.."
python3 -c "import torch; assert torch.cuda.is_available(), 'no CUDA GPU'; print(torch.__version__, torch.cuda.get_device_name())"
PYTHONPATH=. python3 -m pytest -q -m gpu tests/test_devices.py -p no:cacheprovider
