#!/usr/bin/env bash
# The tests, on a machine with only a CPU:
#
#   bash runs/tests.sh                             makes its own environments in .venv, .venv-older and .venv-vllm
#   LONG=1 bash runs/tests.sh                      with those marked "long" too, which show at length what others show
#                                                  in short
#   EAGLE_ENV=current bash runs/tests.sh           uses the packages that are there
#   SKIP_VLLM=1 bash runs/tests.sh                 leaves out the tests that install and run a real vLLM
#   SKIP_OLDER=1 bash runs/tests.sh                leaves out the second run on the oldest packages (torch 2.1), which
#                                                  needs a Python 3.10 or 3.11 and is left out without one
#   NEED_SIMULATED_NPU=1 bash runs/tests.sh        tests/npu fails where it cannot build its device, else it is skipped
set -euo pipefail
source "$(dirname "${BASH_SOURCE[0]}")/environment.sh"

if "$PYTHON" -c "import ruff" 2>/dev/null; then
    "$PYTHON" -m ruff check .
    "$PYTHON" -m ruff format --check .
fi
if "$PYTHON" -c "import mypy" 2>/dev/null; then
    "$PYTHON" -m mypy
fi
# torch 2.1.0 has wheels for Python 3.8 to 3.11.
older_python() {
    local python
    for python in python3 python3.11 python3.10; do
        if "$python" -c 'import ensurepip, sys, venv; sys.exit(sys.version_info[:2] not in [(3, 10), (3, 11)])' 2>/dev/null
        then
            command -v "$python"
            return
        fi
    done
    return 1
}
# The other environments take minutes to install, most of them spent waiting. Each is made by a process group of its own.
older_environment= vllm_environment= left_out=
trap 'for group in $older_environment $vllm_environment; do kill -- "-$group" 2>/dev/null || true; done' EXIT
set -m
if [ "${SKIP_OLDER:-}" != 1 ] && [ "${EAGLE_ENV:-}" != current ]; then
    if older_base="$(older_python)"; then
        make_environment .venv-older requirements-older.txt "$older_base" </dev/null &
        older_environment=$!
    else
        left_out="note: the second run, with the oldest packages, is left out: torch 2.1.0 needs Python 3.10 or 3.11, and \
none of python3, python3.11 and python3.10 is one of these (with venv)."
        echo "$left_out" >&2
    fi
fi
if [ "${SKIP_VLLM:-}" != 1 ]; then
    PYTHON="${given_python:-python3}" bash runs/vllm_environment.sh .venv-vllm </dev/null &
    vllm_environment=$!
fi
set +m
# made VARIABLE FOLDER: waits until the environment that process makes is there; ends everything where it is not.
made() {
    local code=0
    wait "${!1}" || code=$?
    printf -v "$1" ''
    if [ "$code" != 0 ]; then
        echo "error: $2 could not be made (exit code $code); what its installation said is above." >&2
        exit 1
    fi
}
# Side by side, one thread each: threads that share a core wait for each other.
cores="$("$PYTHON" -c 'from eagle.device import cores; print(min(cores(), 4))')"
parallel=(-n "$cores" --dist worksteal)
chosen=()
if [ "${LONG:-}" != 1 ]; then
    chosen=(-m "not long")
    parallel+=("${chosen[@]}")
fi
# tests/npu, which has the longest tests, builds a simulated NPU first, half a minute with g++. Without g++ it is skipped
# and says so, or fails where NEED_SIMULATED_NPU is set.
OMP_NUM_THREADS=1 "$PYTHON" -m pytest "${parallel[@]}" tests/npu tests/unit tests/e2e

if [ -n "$older_environment" ]; then
    made older_environment .venv-older
    OMP_NUM_THREADS=1 .venv-older/bin/python -m pytest -q "${parallel[@]}" tests/unit
    # The steps as the README writes them, an evaluation, and a group of two processes. By file, since the steps run once
    # a worker.
    OMP_NUM_THREADS=1 .venv-older/bin/python -m pytest -q -n "$cores" --dist loadfile -k "guide or same_numbers or torchrun" \
        tests/e2e/test_pipeline.py tests/e2e/test_evaluate.py tests/e2e/test_training.py
fi

if [ -n "$vllm_environment" ]; then
    made vllm_environment .venv-vllm
    # By file, since the tests of one share their engines. -rP: what they print of acceptance is shown.
    .venv-vllm/bin/python -m pytest -n "$cores" --dist loadfile -rP ${chosen[@]+"${chosen[@]}"} tests/vllm
fi
if [ -n "$left_out" ]; then
    echo "$left_out" >&2
fi
if [ "${LONG:-}" != 1 ]; then
    echo "note: the tests marked \"long\" are left out; LONG=1 bash runs/tests.sh runs them too." >&2
fi
