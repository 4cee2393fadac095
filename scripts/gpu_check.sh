#!/usr/bin/env bash
# One of the checks that need a GPU: bash scripts/gpu_check.sh devices | train | speed, each at most 250 s, cheapest first.
# Without a network, bring packages along first, into wheels/: bash scripts/gpu_wheels.sh.
# What they find is in $OUT (default: .), a file each, whatever fails: gpu_devices.json and so on.
set -uo pipefail
cd "$(dirname "$0")/.."
[ -d wheels ] && python3 -m pip install --quiet --no-index --no-deps --force-reinstall wheels/*.whl
# cuBLAS reads it once, before any test could set it.
export CUBLAS_WORKSPACE_CONFIG=:4096:8 PYTHONPATH=. HF_HUB_OFFLINE=1 MLFLOW_DISABLE_TELEMETRY=true
exec python3 scripts/gpu_check.py "$@"
