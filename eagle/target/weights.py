"""The target's weights in any file layout, one tensor at a time, and the fingerprint that tells targets apart.

Layouts: ``model.safetensors``, ``pytorch_model.bin``, either of them sharded with an index file, or any single
weight file a caller names.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open

from eagle.errors import RequestError
from eagle.target.config import ModelConfig, load_config
from eagle.target.families import TARGET_FAMILIES

# In the order transformers itself prefers them.
_SINGLE_FILES = ("model.safetensors", "pytorch_model.bin")
_INDEX_FILES = ("model.safetensors.index.json", "pytorch_model.bin.index.json")


class Weights:
    """The tensors of a model folder by name, read one at a time whatever the file layout.

    weight_name: a single weight file inside the folder, where the caller knows better.

    Raises: FileNotFoundError when there are no weights or a shard is missing; RequestError for an unreadable
    file.
    """

    def __init__(self, folder: str | Path, weight_name: str | None = None, flag: str = "--model_name") -> None:
        self.folder = Path(folder)
        self.flag = flag
        self._pickled: dict[Path, dict[str, torch.Tensor]] = {}
        self._file_of = self._locate(weight_name)

    def _locate(self, weight_name: str | None) -> dict[str, Path]:
        if weight_name is not None:
            path = self.folder / weight_name
            if not path.is_file():
                there = sorted(p.name for p in self.folder.glob("*") if p.suffix in (".bin", ".safetensors"))
                raise FileNotFoundError(
                    f"{self.flag}: {path} does not exist. Weight files in {self.folder}: {', '.join(there) or 'none'}."
                )
            if path.name.endswith(".index.json"):
                return self._read_index(path)
            return dict.fromkeys(self._names_in(path), path)
        for name in _SINGLE_FILES + _INDEX_FILES:
            path = self.folder / name
            if path.is_file():
                return self._read_index(path) if name in _INDEX_FILES else dict.fromkeys(self._names_in(path), path)
        raise FileNotFoundError(
            f"{self.flag} {self.folder}: no weights found; expected {', '.join(_SINGLE_FILES)} or a sharded "
            "model with its index file."
        )

    def _read_index(self, path: Path) -> dict[str, Path]:
        try:
            weight_map = json.loads(path.read_text(encoding="utf-8"))["weight_map"]
        except (ValueError, KeyError) as error:
            raise RequestError(f"{path} is not a weight index ({error!r}). Fetch the model again.") from error
        missing = sorted({name for name in weight_map.values() if not (self.folder / name).is_file()})
        if missing:
            raise FileNotFoundError(f"{path} names {', '.join(missing)}, not in the folder. Fetch the model again.")
        return {name: self.folder / file for name, file in weight_map.items()}

    def _names_in(self, path: Path) -> Iterable[str]:
        if path.suffix == ".safetensors":
            with _open_safetensors(path) as file:
                return list(file.keys())
        return list(self._load_pickled(path))

    def _load_pickled(self, path: Path) -> dict[str, torch.Tensor]:
        if path not in self._pickled:
            try:
                content = torch.load(path, map_location="cpu", mmap=True, weights_only=True)
            except RuntimeError:  # the format of torch before 1.6 cannot be memory-mapped
                content = _load_legacy(path)
            except Exception as error:  # pickle raises anything on a damaged or unsafe file
                raise RequestError(
                    f"{path} cannot be read as weights: {error}. It is damaged or not a plain state dict."
                ) from error
            if not isinstance(content, dict):
                raise RequestError(f"{path} holds a {type(content).__name__}; expected a state dict of tensors.")
            self._pickled[path] = content
        return self._pickled[path]

    def names(self) -> list[str]:
        return list(self._file_of)

    def __contains__(self, name: str) -> bool:
        return name in self._file_of

    def __getitem__(self, name: str) -> torch.Tensor:
        """The tensor in its stored dtype. Raises: KeyError."""
        path = self._file_of[name]
        if path.suffix == ".safetensors":
            with _open_safetensors(path) as file:
                return file.get_tensor(name)
        return self._load_pickled(path)[name]

    def files(self) -> list[Path]:
        return sorted(set(self._file_of.values()))


def _open_safetensors(path: Path) -> Any:
    try:
        return safe_open(path, framework="pt", device="cpu")
    except SafetensorError as error:
        raise RequestError(f"{path} is not a whole safetensors file: {error}. Fetch it again.") from error


def _load_legacy(path: Path) -> dict[str, torch.Tensor]:
    try:
        return torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:
        raise RequestError(
            f"{path} cannot be read as weights: {error}. It is damaged or not a plain state dict."
        ) from error


def read_embedding(weights: Weights, config: ModelConfig) -> torch.Tensor:
    """The target's input embedding ``[V, H]`` in its stored dtype."""
    return _checked(weights, TARGET_FAMILIES[config.family].embedding, config)


def read_head(weights: Weights, config: ModelConfig) -> torch.Tensor:
    """The target's ``lm_head`` ``[V, H]`` in its stored dtype; with tied embeddings the embedding itself."""
    if config.tie_word_embeddings:
        return read_embedding(weights, config)
    head = TARGET_FAMILIES[config.family].head
    if head not in weights:
        raise RequestError(
            f"{weights.flag} {weights.folder}: no {head} among its weights and tie_word_embeddings is false. "
            "The download is incomplete, or config.json is not this model's."
        )
    return _checked(weights, head, config)


def _checked(weights: Weights, name: str, config: ModelConfig) -> torch.Tensor:
    if name not in weights:
        raise RequestError(
            f"{weights.flag} {weights.folder}: no {name} among its weights. It is not a "
            f"{TARGET_FAMILIES[config.family].describes} causal language model in the Hugging Face layout."
        )
    tensor = weights[name]
    expected = (config.vocab_size, config.hidden_size)
    if tuple(tensor.shape) != expected:
        raise RequestError(
            f"{weights.flag} {weights.folder}: {name} is {list(tensor.shape)}, but config.json says "
            f"{list(expected)} (vocab_size x hidden_size). They are not of the same model."
        )
    return tensor


def fingerprint(folder: str | Path, weights: Weights | None = None) -> str:
    """sha256 that tells two targets apart: the config and three tensors every fine-tuning moves.

    The bytes are taken as stored, so the same model in another file layout has the same fingerprint and the
    same model in another dtype has not.
    """
    config, weights = load_config(folder), weights or Weights(folder)
    digest = hashlib.sha256(config.digest().encode())
    family = TARGET_FAMILIES[config.family]
    for mark in family.marks:
        name = mark.format(last=config.num_hidden_layers - 1)
        if name not in weights:
            raise RequestError(f"{folder}: no {name} among its weights; it is not a {family.describes} model.")
        digest.update(weights[name].contiguous().view(torch.uint8).numpy().tobytes())
    return digest.hexdigest()
