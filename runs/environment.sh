# Sourced by the other scripts here: sets $PYTHON to an interpreter that has the toolkit's packages.
#
#   EAGLE_ENV=current   use the python3 of this shell as it is (an Ascend container with its own torch, say);
#                       only small missing packages are added to it, torch and transformers are left alone
#   (unset)             make .venv in the checkout and install requirements-dev.txt, once; with PYTHON's interpreter
#                       where that is set
#
# $given_python is what PYTHON was before.

given_python="${PYTHON:-}"
root="$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)"
cd "$root"
export TOKENIZERS_PARALLELISM=false
source "$root/runs/own_folder.sh"

# make_environment FOLDER REQUIREMENTS [PYTHON]: a virtual environment with these packages, made once per requirements file.
# A folder that was not made here is left alone.
make_environment() {
    local folder="$1" requirements="$2" base wanted
    wanted="$(cat requirements.txt "$requirements")"
    if [ "$(cat "$folder/installed.txt" 2>/dev/null)" = "$wanted" ]; then
        return
    fi
    base="${3:-$(command -v python3 || command -v python)}"
    "$base" -c 'import sys; sys.exit(sys.version_info < (3, 10))' || {
        echo "error: $base is $("$base" --version); Python 3.10 or newer is needed." >&2
        exit 2
    }
    echo "Making $folder with $requirements ..."
    start_anew "$folder" installed.txt
    # Chained, since a shell that sources this may not end at what fails: half an environment is never called complete.
    "$base" -m venv "$folder" &&
        "$folder/bin/python" -m pip install -q -r "$requirements" &&
        printf '%s\n' "$wanted" >"$folder/installed.txt"
}

if [ "${EAGLE_ENV:-}" = current ]; then
    PYTHON="$(command -v python3 || command -v python)"
    if "$PYTHON" -c "import importlib.util as u; raise SystemExit(u.find_spec('vllm') is None)" 2>/dev/null; then
        cure="pip list --format=freeze | grep -iE '^(torch|numpy|transformers|tokenizers)' > image.txt;"
        cure+=" pip install -r requirements-container-vllm.txt -c image.txt (which keep the transformers that vLLM needs)."
    else
        cure="pip list --format=freeze | grep -iE '^(torch|numpy)' > image.txt;"
        cure+=" pip install -r requirements-container.txt -c image.txt (with torch 2.1 to 2.4:"
        cure+=" requirements-container-older.txt)."
    fi
    for package in torch transformers accelerate safetensors numpy tqdm jinja2 psutil sentencepiece protobuf; do
        "$PYTHON" -c "import ${package/#protobuf/google.protobuf}" 2>/dev/null || {
            echo "error: EAGLE_ENV=current, but $PYTHON has no $package. Install what is missing beside the torch that is" \
                "there (docs/ascend.md, which versions go together), or unset EAGLE_ENV: $cure" >&2
            exit 2
        }
    done
    "$PYTHON" -c "import transformers.utils as u; raise SystemExit(not u.is_torch_available())" 2>/dev/null || {
        echo "error: EAGLE_ENV=current, but $PYTHON's transformers does not work with its torch: $cure" >&2
        exit 2
    }
    for package in gguf matplotlib pytest hypothesis xdist ninja; do
        "$PYTHON" -c "import $package" 2>/dev/null || "$PYTHON" -m pip install -q "${package/#xdist/pytest-xdist}"
    done
elif [ -n "${EAGLE_ENV:-}" ]; then
    echo "error: EAGLE_ENV=$EAGLE_ENV; expected 'current', or leave it unset for an environment of its own." >&2
    exit 2
else
    make_environment "$root/.venv" requirements-dev.txt "$given_python" || exit
    PYTHON="$root/.venv/bin/python"
fi
