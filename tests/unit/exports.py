"""What the tests of step 5 share: a random draft in our own checkpoint layout, and reading folders."""

from __future__ import annotations

import hashlib
import json
from pathlib import Path

import torch
from safetensors.torch import load_file

from eagle.drafts.eagle1.network import Eagle1Network
from eagle.drafts.saved import save_draft
from eagle.target.config import load_config
from eagle.target.weights import Weights, read_embedding


def make_draft(folder: Path, base: Path) -> Path:
    """A random draft of `base` in our own checkpoint layout."""
    target = load_config(base)
    torch.manual_seed(3)
    model = Eagle1Network(target.draft(), read_embedding(Weights(base), target))
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if name.endswith(".bias"):
                parameter.normal_()
    save_draft(model, folder)
    return folder


def hashes(folder: Path) -> dict[str, str]:
    return {
        str(path.relative_to(folder)): hashlib.sha256(path.read_bytes()).hexdigest()
        for path in sorted(folder.rglob("*"))
        if path.is_file()
    }


def read(folder: Path) -> tuple[dict, dict[str, torch.Tensor]]:
    return json.loads((folder / "config.json").read_text()), load_file(folder / "model.safetensors")
