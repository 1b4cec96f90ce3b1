"""The target's weights in any file layout: what the headers say, one tensor at a time, some bytes of one.

Layouts: ``model.safetensors``, ``pytorch_model.bin``, either of them sharded with an index file, or any single
weight file a caller names.
"""

from __future__ import annotations

import hashlib
import json
import math
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open

from eagle.dtypes import dtype_name
from eagle.errors import RequestError
from eagle.files import check_no_pointer
from eagle.target.config import ModelConfig, load_config
from eagle.target.families import TARGET_FAMILIES
from eagle.target.quantization import Use
from eagle.tensor_file import DTYPE_CODES

#: In the order in which transformers takes them (`_get_resolved_checkpoint_files`): the trunk is read by transformers,
#: head and embedding here, and both have to be of the same files.
WEIGHT_FILES = (
    "model.safetensors", "model.safetensors.index.json", "pytorch_model.bin", "pytorch_model.bin.index.json"
)  # fmt: skip
_INDEX = ".index.json"
#: What stands in a folder whose weights are not of a kind in `WEIGHT_FILES`, and what to do about it.
_OTHER_KINDS = {
    "*.gguf": "a GGUF file, which llama.cpp reads: use the model it was made from",
    "consolidated*": "Meta's original form: convert it with transformers' convert_llama_weights_to_hf.py",
    "*.index.json": "the index of another file layout: fetch the model in safetensors form",
    "*.ckpt*": "another framework's form: fetch the model in safetensors form",
    "*.safetensors": "no file of the expected name: give a single file the name model.safetensors, fetch an index to "
    "several",
    "*.bin": "no file of the expected name: give a single file the name pytorch_model.bin, fetch an index to several",
}

#: What trainers leave beside weights.
_NO_WEIGHTS = ("training_args.bin", "optimizer.bin", "scheduler.bin")


@dataclass(frozen=True, slots=True)
class Header:
    """What a file says of a tensor.

    dtype: as safetensors calls it. begin: where its bytes begin in the file, None where it is pickled. size: bytes.
    """

    dtype: str
    shape: tuple[int, ...]
    begin: int | None
    size: int


class Weights:
    """The tensors of a model folder by name, read one at a time whatever the file layout.

    weight_name: a single weight file inside the folder, where the caller knows better.

    Raises: FileNotFoundError when there are no weights or a shard is missing; RequestError for an unreadable
    file, or an index that leads outside the folder.
    """

    def __init__(self, folder: str | Path, weight_name: str | None = None, flag: str = "--model_name") -> None:
        self.folder = Path(folder)
        self.flag = flag
        self.weight_name = weight_name
        self._pickled: dict[Path, dict[str, torch.Tensor]] = {}
        self._headers: dict[Path, dict[str, Header]] = {}
        self._file_of = self._locate()

    def _locate(self) -> dict[str, Path]:
        if self.weight_name is not None:
            path = self.folder / self.weight_name
            if not path.is_file():
                there = sorted(p.name for p in self.folder.glob("*") if p.suffix in (".bin", ".safetensors"))
                raise FileNotFoundError(
                    f"{self.flag}: {path} does not exist. Weight files in {self.folder}: {', '.join(there) or 'none'}."
                )
        else:
            path = first_weight_file(self.folder) or self._no_weights()
        check_no_pointer(path)
        return self._read_index(path) if path.name.endswith(_INDEX) else dict.fromkeys(self.headers_in(path), path)

    def _no_weights(self) -> Path:
        for pattern, cure in _OTHER_KINDS.items():
            found = sorted(path for path in self.folder.glob(pattern) if path.name not in _NO_WEIGHTS)
            if found:
                raise FileNotFoundError(f"{self.flag} {self.folder}: no weights found. {found[0].name} is {cure}.")
        raise FileNotFoundError(
            f"{self.flag} {self.folder}: no weights found; expected model.safetensors, pytorch_model.bin or a sharded "
            "model with its index file."
        )

    def _read_index(self, path: Path) -> dict[str, Path]:
        try:
            weight_map = json.loads(path.read_text(encoding="utf-8"))["weight_map"]
            files = set(weight_map.values())
            outside = sorted(name for name in files if Path(name).is_absolute() or ".." in Path(name).parts)
        except (ValueError, KeyError, AttributeError, TypeError) as error:
            raise RequestError(f"{path} is not a weight index ({error!r}). Fetch the model again.") from error
        if outside:
            raise RequestError(
                f"{path} names {outside[0]!r}, which is outside its folder. An index names files beside it; this one "
                "means other files than the model's. Fetch the model from a source that you trust."
            )
        missing = sorted(name for name in files if not (self.folder / name).is_file())
        if missing:
            shown = ", ".join(missing[:3]) + (f" and {len(missing) - 3} more" if len(missing) > 3 else "")
            raise FileNotFoundError(f"{path} names {shown}, not in the folder. Fetch the model again.")
        return {name: self.folder / file for name, file in weight_map.items()}

    def headers_in(self, path: Path) -> dict[str, Header]:
        """What a file says of its tensors, by name."""
        if path not in self._headers:
            check_no_pointer(path)
            if path.suffix == ".safetensors":
                self._headers[path] = _safetensors_headers(path)
            else:
                self._headers[path] = {name: _header_of(t) for name, t in self._load_pickled(path).items()}
        return self._headers[path]

    def _load_pickled(self, path: Path) -> dict[str, torch.Tensor]:
        if path not in self._pickled:
            try:
                content = torch.load(str(path), map_location="cpu", mmap=True, weights_only=True)
            except RuntimeError:  # the format of torch before 1.6 cannot be memory-mapped
                content = _load_legacy(path)
            except Exception as error:  # pickle raises anything on a damaged or unsafe file
                raise _unreadable(path, error) from error
            if not isinstance(content, dict):
                raise RequestError(f"{path} holds a {type(content).__name__}; expected a state dict of tensors.")
            inside = [str(name) for name, value in content.items() if not isinstance(value, torch.Tensor)]
            if inside:
                raise RequestError(
                    f"{path} holds other things than tensors by name ({', '.join(inside[:3])}): a trainer's own "
                    "checkpoint. Expected a plain state dict, as save_pretrained writes it."
                )
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

    def header(self, name: str) -> Header | None:
        """What its file says of a tensor; None where the index names a file that does not hold it. Raises: KeyError."""
        return self.headers_in(self._file_of[name]).get(name)

    def pieces(self, name: str, spans: list[tuple[int, int]]) -> list[bytes]:
        """Some of a tensor's bytes as they are stored, each span by its first byte and length. Raises: KeyError."""
        path = self._file_of[name]
        begin = self.headers_in(path)[name].begin
        if begin is None:
            flat = self._load_pickled(path)[name].contiguous().view(-1).view(torch.uint8)
            return [flat[start : start + length].numpy().tobytes() for start, length in spans]
        found = []
        with path.open("rb", buffering=0) as file:
            for start, length in spans:
                file.seek(begin + start)
                found.append(file.read(length))
        return found

    def bytes(self) -> int:
        """Of all tensors together, as they are stored."""
        headers = (self.header(name) for name in self.names())
        return sum(header.size for header in headers if header)

    def file_of(self, name: str) -> Path:
        """The file a tensor is in. Raises: KeyError."""
        return self._file_of[name]

    def files(self) -> list[Path]:
        return sorted(set(self._file_of.values()))


def first_weight_file(folder: Path) -> Path | None:
    """The file transformers would begin with; None where there is none."""
    return next((folder / name for name in WEIGHT_FILES if (folder / name).is_file()), None)


def _open_safetensors(path: Path) -> Any:
    try:
        return safe_open(path, framework="pt", device="cpu")
    except SafetensorError as error:
        raise RequestError(f"{path} is not a whole safetensors file: {error}. Fetch it again.") from error


def _safetensors_headers(path: Path) -> dict[str, Header]:
    """The format: eight bytes of header length, a JSON header, then the tensors (see `eagle.tensor_file`)."""
    with _open_safetensors(path):  # the library checks that the header is sound and the file whole
        pass
    with path.open("rb") as file:
        length = int.from_bytes(file.read(8), "little")
        header = json.loads(file.read(length))
    header.pop("__metadata__", None)
    found = {}
    for name, entry in header.items():
        start, end = entry["data_offsets"]
        found[name] = Header(entry["dtype"], tuple(entry["shape"]), 8 + length + start, end - start)
    return found


def _header_of(tensor: torch.Tensor) -> Header:
    code = DTYPE_CODES.get(tensor.dtype, {torch.float64: "F64", torch.bool: "BOOL"}.get(tensor.dtype))
    size = math.prod(tensor.shape) * tensor.element_size()
    return Header(code or dtype_name(tensor.dtype), tuple(tensor.shape), None, size)


def _load_legacy(path: Path) -> dict[str, torch.Tensor]:
    try:
        return torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:
        raise _unreadable(path, error) from error


def _unreadable(path: Path, error: Exception) -> RequestError:
    # The first line only: torch goes on to advise loading without its checks, which runs what is in the file.
    reason = (str(error) or type(error).__name__).splitlines()[0].rstrip(". ")
    return RequestError(
        f"{path} cannot be read as weights: {reason}. It is damaged or not a plain state dict; fetch it again."
    )


def read_embedding(weights: Weights, config: ModelConfig) -> torch.Tensor:
    """The target's input embedding ``[V, H]`` in its stored dtype."""
    return _checked(weights, TARGET_FAMILIES[config.family].embedding, config)


def read_head(weights: Weights, config: ModelConfig) -> torch.Tensor:
    """The target's ``lm_head`` ``[V, H]`` in its stored dtype, so that its products are the target's logits.

    With tied embeddings it is the embedding; where a family scales its logits, that is in it.
    """
    head = read_embedding(weights, config) if config.tie_word_embeddings else _own_head(weights, config)
    return head if config.logit_scale == 1.0 else head * config.logit_scale


def _own_head(weights: Weights, config: ModelConfig) -> torch.Tensor:
    head = TARGET_FAMILIES[config.family].head
    if head not in weights:
        raise RequestError(
            f"{weights.flag} {weights.folder}: no {head} among its weights and tie_word_embeddings is false. "
            "The download is incomplete, or config.json is not this model's."
        )
    return _checked(weights, head, config)


def read_norm(weights: Weights, config: ModelConfig) -> torch.Tensor:
    """What the target's final norm multiplies by, ``[H]``, in its stored dtype, or float32 where that adds to it."""
    family = TARGET_FAMILIES[config.family]
    name = family.norm
    if name not in weights:
        raise RequestError(
            f"{weights.flag} {weights.folder}: no {name} among its weights. It is not a "
            f"{family.describes} causal language model in the Hugging Face layout."
        )
    return weights[name].float() + family.norm_offset if family.norm_offset else weights[name]


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
    """The fingerprint of version 0.1, which its stores and checkpoints name: the config and three tensors.

    sha256 over the bytes as stored. What is made now names `eagle.target.identity.Identity.current`, which covers every
    tensor.
    """
    config, weights = load_config(folder, use=Use.SERVED), weights or Weights(folder)
    if config.quantization:
        return ""  # which version 0.1 refused
    digest = hashlib.sha256(config.digest().encode())
    family = TARGET_FAMILIES[config.family]
    for mark in family.marks:
        name = mark.format(last=config.num_hidden_layers - 1)
        if name not in weights:
            return ""  # of a kind that version 0.1 did not know, and that nothing of it names
        digest.update(weights[name].contiguous().view(torch.uint8).numpy().tobytes())
    return digest.hexdigest()
