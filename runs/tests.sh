#!/usr/bin/env bash
# All tests, on a machine with only a CPU:
#
#   bash runs/tests.sh                             makes its own environments in .venv, .venv-older and .venv-vllm
#   EAGLE_ENV=current bash runs/tests.sh           uses the packages that are there
#   SKIP_VLLM=1 bash runs/tests.sh                 leaves out the tests that install and run a real vLLM
#   SKIP_OLDER=1 bash runs/tests.sh                leaves out the second run of the unit tests on older packages
set -euo pipefail
source "$(dirname "${BASH_SOURCE[0]}")/environment.sh"

if "$PYTHON" -c "import ruff" 2>/dev/null; then
    "$PYTHON" -m ruff check .
    "$PYTHON" -m ruff format --check .
fi
if "$PYTHON" -c "import mypy" 2>/dev/null; then
    "$PYTHON" -m mypy
fi
# vLLM takes minutes to install, most of them spent waiting.
if [ "${SKIP_VLLM:-}" != 1 ]; then
    bash runs/vllm_environment.sh .venv-vllm &
    vllm_environment=$!
    trap 'kill $vllm_environment 2>/dev/null || true' EXIT
fi
# Side by side, one thread each: threads that share a core wait for each other.
cores="$("$PYTHON" -c 'from eagle.device import cores; print(min(cores(), 4))')"
parallel=(-n "$cores" --dist worksteal)
# tests/npu builds a simulated NPU first, half a minute with g++; without g++ it is skipped and says so.
OMP_NUM_THREADS=1 "$PYTHON" -m pytest "${parallel[@]}" tests/unit tests/e2e tests/npu

if [ "${SKIP_OLDER:-}" != 1 ] && [ "${EAGLE_ENV:-}" != current ]; then
    make_environment .venv-older requirements-older.txt
    OMP_NUM_THREADS=1 .venv-older/bin/python -m pytest -q "${parallel[@]}" tests/unit
fi

if [ "${SKIP_VLLM:-}" != 1 ]; then
    wait "$vllm_environment"
    trap - EXIT
    .venv-vllm/bin/python -m pytest tests/vllm -s
fi
