"""A Llama model as a Qwen2 model with small biases: a Qwen2 target that really talks, where none can be downloaded.

    python -m tests.make_qwen2 quickstart/model quickstart/qwen2

The two families differ in Qwen2's biases on q, k and v alone. They are drawn from a seeded normal distribution: large
enough that a lost one changes the output, small enough that the model still makes sense.
"""

from __future__ import annotations

import json
import shutil
import sys
from pathlib import Path

import torch
from safetensors.torch import save_file

from eagle.entry import run
from eagle.errors import RequestError
from eagle.files import read_json
from eagle.target.config import load_config
from eagle.target.weights import Weights

BIAS_STD = 0.05


def make_qwen2(source: Path, folder: Path, seed: int = 0) -> Path:
    """Write `source` as a Qwen2 model folder. Raises: RequestError for a model that is not a plain Llama."""
    config = load_config(source)
    if config.family != "llama" or config.qkv_bias or config.mlp_bias:
        raise RequestError(f"{source} is not a Llama model without biases.")
    if config.head_dim * config.num_attention_heads != config.hidden_size:
        raise RequestError(f"{source}: a Qwen2 model's heads share its hidden size, this one's do not.")
    weights = Weights(source)
    tensors = {name: weights[name].contiguous() for name in weights.names()}
    generator = torch.Generator().manual_seed(seed)
    for name in sorted(tensors):
        if name.endswith(("q_proj.weight", "k_proj.weight", "v_proj.weight")):
            bias = torch.randn(tensors[name].shape[0], generator=generator) * BIAS_STD
            tensors[name.replace(".weight", ".bias")] = bias.to(tensors[name].dtype)
    raw = read_json(source / "config.json", "a model's config.json")
    for key in ("attention_bias", "mlp_bias", "head_dim", "pretraining_tp"):
        raw.pop(key, None)
    raw |= {"architectures": ["Qwen2ForCausalLM"], "model_type": "qwen2", "use_sliding_window": False}
    folder.mkdir(parents=True)
    for file in source.iterdir():
        if file.is_file() and not file.name.startswith(("config.json", "model", "pytorch_model")):
            shutil.copy(file, folder)
    (folder / "config.json").write_text(json.dumps(raw, indent=2), encoding="utf-8")
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    return folder


def main(argv: list[str] | None = None) -> int:
    source, folder = (Path(argument) for argument in (sys.argv[1:] if argv is None else argv))
    print(make_qwen2(source, folder))
    return 0


if __name__ == "__main__":
    sys.exit(run(main))
