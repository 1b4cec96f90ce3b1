"""Can this base model be worked with? Asked before anything is claimed, of config.json and the weight files' headers.

No tensor is read, so it takes a second for a 70B target. What is wrong in config.json alone, its family refuses
(`eagle.target.families`); which tensors there have to be, transformers' own module says (`eagle.target.trunk`).
"""

from __future__ import annotations

import re
from dataclasses import dataclass
from pathlib import Path

from eagle.errors import RequestError
from eagle.files import read_json
from eagle.target.config import ModelConfig, load_config
from eagle.target.families import TARGET_FAMILIES
from eagle.target.identity import Identity
from eagle.target.quantization import UNQUANTIZED, Use, check_head, plain_tensors, quantized_tensors
from eagle.target.trunk import expected_tensors, served_config
from eagle.target.weights import Header, Weights, first_weight_file
from eagle.text import listed

ADAPTER = "adapter_config.json"
_LORA_NAME = re.compile(r"(^|\.)lora_(A|B|embedding_A|embedding_B)(\.|$)")
_LAYER = re.compile(r"\.layers\.(\d+)\.")
_FLOATING = ("F64", "F32", "F16", "BF16")


@dataclass(frozen=True, slots=True)
class CheckedTarget:
    """A base model that can be worked with. weights: those of the file that was named, else as transformers reads; of a
    file that is one part of these and holds not all that a draft takes, all of them."""

    config: ModelConfig
    weights: Weights
    identity: Identity


def check_target(folder: Path, flag: str, weight_name: str | None = None, use: Use = Use.PLAIN) -> CheckedTarget:
    """A base model's folder, checked. weight_name: a weight file that may hold only part of the tensors. use: what the
    model is for, which a quantized one may not do.

    Raises: FileNotFoundError, RequestError.
    """
    config = check_config(folder, flag, use)
    weights = Weights(folder, weight_name, flag)
    expected = expected_tensors(config)
    served_config(folder, config)  # what transformers would say of it later, in a worker
    _check_tensors(weights, expected, config)
    if weights.weight_name is None or (not config.quantization and expected.keys() <= set(weights.names())):
        return CheckedTarget(config, weights, Identity(folder, weights))
    whole = Weights(folder, flag=flag) if first_weight_file(folder) else weights
    family = TARGET_FAMILIES[config.family]
    taken = {family.embedding} if config.tie_word_embeddings else {family.embedding, family.head}
    if not taken <= set(weights.names()) and _is_part(weights, whole):
        _check_tensors(whole, expected, config)
        return CheckedTarget(config, whole, Identity(folder, whole))
    return CheckedTarget(config, weights, Identity(folder, whole))


def _is_part(named: Weights, whole: Weights) -> bool:
    """Whether the file that was named is one of those that transformers reads, as the guide's example is."""
    names = set(whole.names())
    return all(name in names and whole.file_of(name) == named.file_of(name) for name in named.names())


def check_config(folder: Path, flag: str, use: Use = Use.PLAIN) -> ModelConfig:
    """What can be said without the weights; use: as in `check_target`. Raises: FileNotFoundError, RequestError."""
    adapter = folder / ADAPTER
    if adapter.is_file():
        raise RequestError(f"{flag} {folder} {_adapter(folder)}")
    return load_config(folder, use=use)


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
    _check_own(where, headers)
    expected = _check_quantized(where, headers, expected, config)
    if weights.weight_name is None:
        _check_complete(where, expected, headers, config)
    wrong = [
        f"{name} is {list(headers[name].shape)}, config.json says {list(shape)}"
        for name, shape in expected.items()
        if name in headers and headers[name].shape != shape
    ]
    if wrong:
        raise RequestError(
            f"{where}: {listed(wrong, '; ')}. Weights and config.json are not of the same model; fetch both from one "
            "place."
        )
    odd = [f"{name} ({headers[name].dtype})" for name in expected if name in headers and not _floats(headers[name])]
    if odd:
        raise RequestError(f"{where}: {listed(odd)}: expected floating-point weights, or {UNQUANTIZED}")


def _floats(header: Header) -> bool:
    return header.dtype in _FLOATING


def _check_quantized(
    where: str, headers: dict[str, Header], expected: dict[str, tuple[int, ...]], config: ModelConfig
) -> dict[str, tuple[int, ...]]:
    """Which of the expected tensors have to be as expected.

    Raises: RequestError for weights that are quantized where the config says nothing of it, the other way round, and
    where a draft's own part of them is.
    """
    found, family = config.quantization, TARGET_FAMILIES[config.family]
    marks = quantized_tensors({name: header.dtype for name, header in headers.items()}, expected)
    if found is None:
        if marks:
            raise RequestError(
                f"{where}: its weights are those of a quantized model: {listed(marks)}. config.json does not say how "
                f"they were quantized: take the one that was published with them, or {UNQUANTIZED}"
            )
        return expected
    if not marks:
        raise RequestError(
            f"{where}: {found.file} says that this is a quantized model ({found.method}), and not one of its tensors "
            f"is quantized. Take both from one place, or {UNQUANTIZED}"
        )
    check_head(found, marks, family, where)
    return plain_tensors(expected, family)


def _check_own(where: str, headers: dict[str, Header]) -> None:
    """Raises: RequestError for LoRA tensors and drafts."""
    lora = [name for name in headers if _LORA_NAME.search(name)]
    if lora:
        raise RequestError(
            f"{where}: its weights hold a LoRA adapter that is not merged: {listed(lora)}. Merge it with peft's "
            "merge_and_unload() and save the model again."
        )
    if "fc.weight" in headers or "model.fc.weight" in headers:
        raise RequestError(
            f"{where}: its weights are a draft's (fc.weight is among them). Name the folder of the base model that the "
            "draft is for."
        )


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
        raise RequestError(f"{where}: no {listed(missing)} among its weights. {cause}")
    # A buffer that old conversions saved; what a reward or value model adds outside the trunk changes no feature.
    trunk = family.embedding.partition(".")[0] + "."
    unknown = [n for n in headers if n.startswith(trunk) and n not in expected and "rotary_emb" not in n]
    if config.quantization:  # of what a format adds to a layer the engine knows more
        unknown = [n for n in unknown if (at := _LAYER.search(n)) and int(at[1]) >= config.num_hidden_layers]
    if unknown:
        raise RequestError(
            f"{where}: its weights hold {listed(unknown)}, which the model that config.json describes "
            f"({config.num_hidden_layers} layers of a {family.describes}) does not have: they would be left out, and "
            "the features would be another model's. Take the config.json that was published with these weights."
        )


def _others(items: list[str]) -> str:
    return f", nor {len(items) - 1} more" if len(items) > 1 else ""
