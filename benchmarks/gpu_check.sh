#!/usr/bin/env bash
# Builds, tests, sanitises and measures eaft_ext on the GPU of this machine, in one unattended call
# of less than ten minutes. Needs a Python with PyTorch for CUDA, pip, pytest and ninja, and an nvcc;
# it downloads nothing. Without a GPU it says so and ends with 2.
#   benchmarks/gpu_check.sh                           all steps; --help lists them
#   benchmarks/gpu_check.sh --only build,bench --wheels DIR --output DIR --minutes 9.5 --commit ID
#   PYTHON=/path/to/python benchmarks/gpu_check.sh    another interpreter than python3
set -euo pipefail

python=${PYTHON:-python3}
if ! command -v "$python" >/dev/null; then
  echo "gpu_check.sh: there is no $python here; set PYTHON to one that has PyTorch" >&2
  exit 1
fi
exec "$python" "$(dirname "${BASH_SOURCE[0]}")/gpu_check.py" "$@"
