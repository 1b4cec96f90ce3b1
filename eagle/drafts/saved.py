"""A draft on disk: the folder it is saved as, and the folders of others that hold one."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import torch

from eagle.drafts.eagle1.network import DraftModel
from eagle.errors import RequestError
from eagle.files import write_json
from eagle.target.config import load_config
from eagle.target.weights import Weights
from eagle.tensor_file import write_tensors

WEIGHTS_FILE = "model.safetensors"


def trained_state(model: DraftModel) -> dict[str, torch.Tensor]:
    """The trainable weights by their public names."""
    return {name: parameter for name, parameter in model.named_parameters() if parameter.requires_grad}


def save_draft(model: DraftModel, folder: Path, whole: dict[str, torch.Tensor] | None = None) -> None:
    """Write ``config.json`` and ``model.safetensors`` (embedding included), a folder that loads by itself.

    whole: the weights by name, where the model itself holds only shards of them.
    """
    folder.mkdir(parents=True, exist_ok=True)
    named = dict(model.named_parameters()) if whole is None else whole
    tensors = {name: tensor.detach().cpu().contiguous() for name, tensor in named.items()}
    write_tensors(folder / WEIGHTS_FILE, tensors)
    write_json(folder / "config.json", model.config.to_json())


def read_draft_state(weights: Weights) -> dict[str, torch.Tensor]:
    """The tensors of a saved draft under their public names, whoever saved it.

    A ``model.`` prefix is taken off; rotary buffers that old scripts saved are left out.
    """
    state = {}
    for name in weights.names():
        bare = name.removeprefix("model.")
        if "rotary_emb" not in bare:
            state[bare] = weights[name]
    return state


def load_draft(folder: str | Path, embedding: torch.Tensor | None = None) -> DraftModel:
    """The draft in a checkpoint or export folder, in its stored dtype.

    embedding: the target's, for exports that leave it out.

    Raises: FileNotFoundError, RequestError (missing or misshapen tensors).
    """
    config = load_config(folder)
    weights = Weights(folder, flag="--draft-path")
    state = read_draft_state(weights)
    state.pop("lm_head.weight", None)
    stored = state.pop("embed_tokens.weight", None)
    embedding = stored if stored is not None else embedding
    if embedding is None:
        raise RequestError(f"{folder} holds no embed_tokens.weight; the target's embedding is needed beside it.")
    model = DraftModel(config, embedding, fc_bias="fc.bias" in state)
    load_trained_state(model, state, str(folder))
    return model.to(state["fc.weight"].dtype)


def load_trained_state(model: DraftModel, state: dict[str, torch.Tensor], source: str) -> None:
    """Copy weights into the draft. Raises: RequestError naming what is missing, extra or of another shape."""
    expected = {name: tuple(tensor.shape) for name, tensor in trained_state(model).items()}
    found = {name: tuple(tensor.shape) for name, tensor in state.items()}
    problems = [f"{name} is missing" for name in expected.keys() - found.keys()]
    problems += [f"{name} is not part of an EAGLE-1 draft" for name in found.keys() - expected.keys()]
    problems += [
        f"{name} is {list(found[name])}, expected {list(expected[name])}"
        for name in expected.keys() & found.keys()
        if found[name] != expected[name]
    ]
    if problems:
        raise RequestError(f"{source} does not hold a draft of this target: {'; '.join(sorted(problems))}.")
    model.load_state_dict(state, strict=False)


def describe(model: DraftModel) -> dict[str, Any]:
    """Parameter counts, for people."""
    return {"trainable": sum(p.numel() for p in model.parameters() if p.requires_grad)}


BEST, LAST = "best", "last"

STATE, OPTIMIZER = "state.json", "optimizer.pt"


def resolve_pointer(path: Path) -> Path:
    """The checkpoint folder behind a pointer, a run's folder (its best, else its last), or the path itself."""
    if path.is_file() and path.name in (BEST, LAST):
        return path.parent / path.read_text(encoding="utf-8").strip()
    if path.is_dir() and not (path / "config.json").exists():
        for pointer in (BEST, LAST):
            if os.path.lexists(path / pointer):
                return resolve_pointer(path / pointer)
    return path.resolve() if path.is_symlink() else path
