"""Can this base model be worked with? Asked before anything is claimed, of config.json and the weight files' headers.

No tensor is read, so it takes a second for a 70B target. What is wrong in config.json alone, its family refuses
(`eagle.target.families`); which tensors there have to be, transformers' own module says (`eagle.target.trunk`).
"""

from __future__ import annotations

import re
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path

from eagle.errors import RequestError
from eagle.files import read_json
from eagle.target.config import ModelConfig, load_config
from eagle.target.families import TARGET_FAMILIES
from eagle.target.identity import Identity
from eagle.target.refusals import UNQUANTIZED
from eagle.target.trunk import expected_tensors
from eagle.target.weights import Header, Weights, first_weight_file

ADAPTER = "adapter_config.json"
#: Files beside the weights in which tools say how they quantized them.
_QUANTIZED_BESIDE = ("hf_quant_config.json", "quantize_config.json", "quant_config.json")
#: Names of what stands beside, or in place of, a weight that was quantized: GPTQ and AWQ, compressed-tensors, FP8,
#: ModelOpt, bitsandbytes.
_QUANTIZED_NAME = re.compile(
    r"(^|[._])(scales?|scale_inv|qweight|qzeros|zeros|g_idx|weight_packed|weight_shape|zero_point|absmax|quant_map|"
    r"nested_absmax|quant_state\.\w+|SCB|amax)$"
)
_LORA_NAME = re.compile(r"(^|\.)lora_(A|B|embedding_A|embedding_B)(\.|$)")
_FLOATING = ("F64", "F32", "F16", "BF16")
#: Shown of a list.
_SHOWN = 4


@dataclass(frozen=True, slots=True)
class CheckedTarget:
    """A base model that can be worked with. weights: those of the file that was named, else as transformers reads."""

    config: ModelConfig
    weights: Weights
    identity: Identity


def check_target(folder: Path, flag: str, weight_name: str | None = None) -> CheckedTarget:
    """A base model's folder, checked. weight_name: a weight file that may hold only part of the tensors.

    Raises: FileNotFoundError, RequestError.
    """
    config = check_config(folder, flag)
    weights = Weights(folder, weight_name, flag)
    expected = expected_tensors(config)
    _check_tensors(weights, expected, config)
    if expected.keys() <= set(weights.names()):
        return CheckedTarget(config, weights, Identity(folder, weights))
    whole = Weights(folder, flag=flag) if first_weight_file(folder) else weights
    return CheckedTarget(config, weights, Identity(folder, whole))


def check_config(folder: Path, flag: str) -> ModelConfig:
    """What can be said without the weights. Raises: FileNotFoundError, RequestError."""
    adapter = folder / ADAPTER
    if adapter.is_file():
        raise RequestError(f"{flag} {folder} {_adapter(folder)}")
    for name in _QUANTIZED_BESIDE:
        if (folder / name).is_file():
            raise RequestError(f"{flag} {folder}: {name} beside it says that this is a quantized model. {UNQUANTIZED}")
    return load_config(folder)


def _adapter(folder: Path) -> str:
    base = read_json(folder / ADAPTER, "a LoRA adapter's config").get("base_model_name_or_path")
    if first_weight_file(folder) is None:
        found = "is a LoRA adapter, not a model"
    else:
        found = "holds a LoRA adapter beside its weights, which is added to them or not as peft is installed or not"
    return (
        f"{found} ({ADAPTER}, made for {base}). Merge it into its base model with peft's merge_and_unload(), save that "
        f"with its tokenizer in a folder of its own, and name that folder; where it is merged already, move {ADAPTER} "
        "away."
    )


def _check_tensors(weights: Weights, expected: dict[str, tuple[int, ...]], config: ModelConfig) -> None:
    """Raises: RequestError for the first kind of fault that there is."""
    where = f"{weights.flag} {weights.folder}"
    names = weights.names()
    headers = {name: header for name in names if (header := weights.header(name)) is not None}
    lacking = sorted(set(names) - headers.keys())
    if lacking:
        file = weights.file_of(lacking[0]).name
        raise RequestError(
            f"{where}: the weight index says that {lacking[0]} is in {file}, which does not hold it"
            f"{_others(lacking)}. Index and files are not of one download; fetch the model again."
        )
    _check_plain(where, headers, expected)
    if weights.weight_name is None:
        _check_complete(where, expected, headers, config)
    wrong = [
        f"{name} is {list(headers[name].shape)}, config.json says {list(shape)}"
        for name, shape in expected.items()
        if name in headers and headers[name].shape != shape
    ]
    if wrong:
        raise RequestError(
            f"{where}: {_listed(wrong, '; ')}. Weights and config.json are not of the same model; fetch both from one "
            "place."
        )
    odd = [f"{name} ({headers[name].dtype})" for name in expected if name in headers and not _floats(headers[name])]
    if odd:
        raise RequestError(f"{where}: {_listed(odd)}: expected floating-point weights. {UNQUANTIZED}")


def _floats(header: Header) -> bool:
    return header.dtype in _FLOATING


def _check_plain(where: str, headers: dict[str, Header], expected: dict[str, tuple[int, ...]]) -> None:
    """Raises: RequestError for quantized weights, LoRA tensors and drafts."""
    marks = [name for name in headers if _QUANTIZED_NAME.search(name)]
    # FP8, FP4, INT8 and packed weights, whether or not a scale is beside them.
    marks += [f"{name} ({headers[name].dtype})" for name in expected if name in headers and _is_packed(headers[name])]
    if marks:
        raise RequestError(f"{where}: its weights are those of a quantized model: {_listed(marks)}. {UNQUANTIZED}")
    lora = [name for name in headers if _LORA_NAME.search(name)]
    if lora:
        raise RequestError(
            f"{where}: its weights hold a LoRA adapter that is not merged: {_listed(lora)}. Merge it with peft's "
            "merge_and_unload() and save the model again."
        )
    if "fc.weight" in headers or "model.fc.weight" in headers:
        raise RequestError(
            f"{where}: its weights are a draft's (fc.weight is among them). Name the folder of the base model that the "
            "draft is for."
        )


def _is_packed(header: Header) -> bool:
    return re.match(r"(F8|F6|F4|I8|U8|I4|U4|float8|float4|uint8|int8|uint4|int4|I32|U32)", header.dtype) is not None


def _check_complete(
    where: str, expected: dict[str, tuple[int, ...]], headers: dict[str, Header], config: ModelConfig
) -> None:
    """Raises: RequestError where a tensor that config.json calls for is missing, or it does not know one there is."""
    family = TARGET_FAMILIES[config.family]
    missing = [name for name in expected if name not in headers]
    if missing:
        if missing == [family.head]:
            cause = "tie_word_embeddings is false. The download is incomplete, or config.json is not this model's."
        elif f"{family.trunk_embedding}.weight" in headers:
            cause = "It was saved without its head: save it again as an AutoModelForCausalLM."
        else:
            cause = "The download is incomplete, or config.json is not this model's."
        raise RequestError(f"{where}: no {_listed(missing)} among its weights. {cause}")
    # A buffer that old conversions saved; what a reward or value model adds outside the trunk changes no feature.
    trunk = family.embedding.partition(".")[0] + "."
    unknown = [n for n in headers if n.startswith(trunk) and n not in expected and "rotary_emb" not in n]
    if unknown:
        raise RequestError(
            f"{where}: its weights hold {_listed(unknown)}, which the model that config.json describes "
            f"({config.num_hidden_layers} layers of a {family.describes}) does not have: they would be left out, and "
            "the features would be another model's. Take the config.json that was published with these weights."
        )


def _listed(items: Iterable[str], separator: str = ", ") -> str:
    items = list(items)
    return separator.join(items[:_SHOWN]) + (f" and {len(items) - _SHOWN} more" if len(items) > _SHOWN else "")


def _others(items: list[str]) -> str:
    return f", nor {len(items) - 1} more" if len(items) > 1 else ""
