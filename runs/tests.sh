#!/usr/bin/env bash
# All tests, on a machine with only a CPU:
#
#   bash runs/tests.sh                             makes its own environments in .venv, .venv-older and .venv-vllm
#   EAGLE_ENV=current bash runs/tests.sh           uses the packages that are there
#   SKIP_VLLM=1 bash runs/tests.sh                 leaves out the tests that install and run a real vLLM
#   SKIP_OLDER=1 bash runs/tests.sh                leaves out the second run on the oldest packages (torch 2.1)
set -euo pipefail
source "$(dirname "${BASH_SOURCE[0]}")/environment.sh"

if "$PYTHON" -c "import ruff" 2>/dev/null; then
    "$PYTHON" -m ruff check .
    "$PYTHON" -m ruff format --check .
fi
if "$PYTHON" -c "import mypy" 2>/dev/null; then
    "$PYTHON" -m mypy
fi
# The other environments take minutes to install, most of them spent waiting.
older_environment= vllm_environment=
trap 'kill $older_environment $vllm_environment 2>/dev/null || true' EXIT
if [ "${SKIP_OLDER:-}" != 1 ] && [ "${EAGLE_ENV:-}" != current ]; then
    make_environment .venv-older requirements-older.txt &
    older_environment=$!
fi
if [ "${SKIP_VLLM:-}" != 1 ]; then
    bash runs/vllm_environment.sh .venv-vllm &
    vllm_environment=$!
fi
# made PID FOLDER: waits until that environment is there; ends everything where it is not.
made() {
    wait "$1" || {
        echo "error: $2 could not be made (exit code $?); what its installation said is above." >&2
        exit 1
    }
}
# Side by side, one thread each: threads that share a core wait for each other.
cores="$("$PYTHON" -c 'from eagle.device import cores; print(min(cores(), 4))')"
parallel=(-n "$cores" --dist worksteal)
# tests/npu, which has the longest tests, builds a simulated NPU first, half a minute with g++; without g++ it is skipped
# and says so.
OMP_NUM_THREADS=1 "$PYTHON" -m pytest "${parallel[@]}" tests/npu tests/unit tests/e2e

if [ -n "$older_environment" ]; then
    made "$older_environment" .venv-older
    OMP_NUM_THREADS=1 .venv-older/bin/python -m pytest -q "${parallel[@]}" tests/unit
    # The steps as the README writes them, an evaluation, and a group of two processes. By file, since the steps run once
    # a worker.
    OMP_NUM_THREADS=1 .venv-older/bin/python -m pytest -q -n "$cores" --dist loadfile -k "guide or same_numbers or torchrun" \
        tests/e2e/test_pipeline.py tests/e2e/test_evaluate.py tests/e2e/test_training.py
fi

if [ -n "$vllm_environment" ]; then
    made "$vllm_environment" .venv-vllm
    .venv-vllm/bin/python -m pytest tests/vllm -s
fi
