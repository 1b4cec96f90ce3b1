"""Drafts of other kinds, and what else people name as one: recognised by what it is, refused in one sentence.

Everybody who reads a draft asks `check_is_draft` first. What the families in `eagle.drafts.families` read is not in the
table here: a new family takes its kind out of it.
"""

from __future__ import annotations

import json
import re
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from eagle.drafts.families import DRAFT_FAMILIES
from eagle.errors import RequestError
from eagle.target.check import ADAPTER
from eagle.target.weights import Weights


@dataclass(frozen=True, slots=True)
class Found:
    """What a folder shows of itself. config: its config.json, empty where there is none. names: of its tensors, without
    a ``model.`` in front. files: names of what is in it."""

    config: dict[str, Any]
    names: frozenset[str]
    files: frozenset[str]

    def architecture(self, *words: str) -> bool:
        """Whether one of these words is in the class that config.json names."""
        named = " ".join(map(str, self.config.get("architectures") or [])).lower()
        return any(word in named for word in words)

    def tensors(self, pattern: str) -> bool:
        """Whether a tensor's name matches, from its beginning."""
        return any(re.match(pattern, name) for name in self.names)


@dataclass(frozen=True, slots=True)
class Kind:
    """Something that is not read here. says: what it is. fix: what to do instead."""

    is_this: Callable[[Found], bool]
    says: Callable[[Found], str]
    fix: str


def _is_full_model(found: Found) -> bool:
    if "fc.weight" in found.names or any(family.recognises(found.names) for family in DRAFT_FAMILIES.values()):
        return False
    layers = found.config.get("num_hidden_layers")
    return bool(found.names) and (
        "norm.weight" in found.names or found.tensors(r"layers\.1\.") or (isinstance(layers, int) and layers > 1)
    )


_AS_IT_IS = "vLLM serves that one as it is, and needs nothing of this toolkit for it"

#: By name, in the order in which they are asked: the plainest marks first.
KINDS: dict[str, Kind] = {
    "lora": Kind(
        lambda found: ADAPTER in found.files or found.tensors(r".*\blora_[AB]\b"),
        lambda found: f"a LoRA adapter ({ADAPTER})" if ADAPTER in found.files else "a LoRA adapter",
        "an adapter changes a base model and drafts nothing; merge it into its base, and train a draft for that",
    ),
    "store": Kind(
        lambda found: "manifest.json" in found.files or any(re.fullmatch(r"data_\d+\.ckpt", f) for f in found.files),
        lambda found: "a store of features",
        "name the folder of checkpoints that was trained on it (--cpdir)",
    ),
    "unfinished run": Kind(
        lambda found: "train_options.json" in found.files and not found.names,
        lambda found: "a training run that has not saved a checkpoint yet",
        "let it go on to its first checkpoint with the same command",
    ),
    "medusa": Kind(
        lambda found: (
            any(key.startswith("medusa_") for key in found.config)
            or found.config.get("model_type") == "medusa"
            or found.architecture("medusa")
            or any(name.startswith("medusa_lm_head") for name in found.files)
            or found.tensors(r"(medusa_heads?\.|blocks\.)?\d+\.(\d+|layers\.\d+)\.")
        ),
        lambda found: "Medusa heads",
        _AS_IT_IS,
    ),
    "mlp speculator": Kind(
        lambda found: found.config.get("model_type") == "mlp_speculator" or found.architecture("mlpspeculator"),
        lambda found: "an MLP speculator",
        _AS_IT_IS,
    ),
    "p-eagle": Kind(
        lambda found: "mask_hidden" in found.names or bool(found.config.get("parallel_drafting")),
        lambda found: "a P-EAGLE draft",
        _AS_IT_IS,
    ),
    "dflash": Kind(
        lambda found: bool(found.config.get("dflash_config")) or found.architecture("dflash"),
        lambda found: "a DFlash draft",
        _AS_IT_IS,
    ),
    "speculators": Kind(
        lambda found: (
            any(key.startswith("speculators_") for key in found.config)
            and found.config.get("speculators_model_type") != "eagle3"
        ),
        lambda found: f"a draft in the form of the speculators library ({found.config.get('speculators_model_type')})",
        _AS_IT_IS,
    ),
    "full model": Kind(
        _is_full_model,
        lambda found: (
            f"a whole model ({', '.join(map(str, found.config.get('architectures') or ['of several layers']))})"
        ),
        "name it as the base model, and here the folder of a draft that was trained for it",
    ),
}


def check_is_draft(folder: Path, flag: str, weight_name: str | None = None) -> None:
    """Whether a folder, to which pointers are resolved, holds something of a kind that is read here.

    Whose draft it is, and whether it is whole, is not looked at.

    Raises: FileNotFoundError, RequestError that says what was found, what was expected and the fix.
    """
    expected = " or ".join(family.describes for family in DRAFT_FAMILIES.values())
    if not folder.exists():
        raise FileNotFoundError(f"{flag} {folder}: no such file or folder; expected the folder of {expected}.")
    if not folder.is_dir():
        raise RequestError(
            f"{flag} {folder} is a file; expected the folder of {expected}: a training run, one of its state_<n>, or a "
            "public draft. Name the folder it is in."
        )
    files = frozenset(path.name for path in folder.iterdir())
    missing: FileNotFoundError | None = None
    try:
        names = frozenset(name.removeprefix("model.") for name in Weights(folder, weight_name, flag).names())
    except FileNotFoundError as error:
        names, missing = frozenset(), error
    found = Found(_config_in(folder), names, files)
    for kind in KINDS.values():
        if kind.is_this(found):
            raise RequestError(
                f"{flag} {folder} does not hold a draft of a kind that is read here: it is {kind.says(found)}, "
                f"expected {expected}; {kind.fix}."
            )
    if missing is None:
        return
    if weight_name is not None or "no weights found" not in str(missing):
        raise missing
    without = "" if "config.json" in files else ", and no config.json"
    raise RequestError(
        f"{flag} {folder}: no weights found{without}; expected the folder of {expected}: a training run, one of its "
        "state_<n>, or a public draft with config.json and model.safetensors or pytorch_model.bin."
    )


def _config_in(folder: Path) -> dict[str, Any]:
    """config.json as it stands; empty where there is none, or one that those who need it will complain about."""
    try:
        content = json.loads((folder / "config.json").read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return {}
    return content if isinstance(content, dict) else {}
