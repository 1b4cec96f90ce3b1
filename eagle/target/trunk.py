"""The frozen target without its ``lm_head``: what computes features."""

from __future__ import annotations

import dataclasses
import math
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch

from eagle.device import VISIBILITY_VARIABLE, free_memory, is_out_of_memory, weight_memory
from eagle.dtypes import check_computes
from eagle.errors import RequestError
from eagle.releases import TORCH
from eagle.target.config import ModelConfig, load_config
from eagle.target.families import TARGET_FAMILIES
from eagle.target.weights import Weights
from eagle.text import listed
from eagle.versions import transformers_release


def check_packages(family: str) -> None:
    """Raises: RequestError where this transformers refuses this torch, or does not have the family.

    It says itself that there is no torch.
    """
    from transformers.utils import is_torch_available

    known = TARGET_FAMILIES[family]
    if transformers_release() < known.since:
        raise RequestError(
            f"transformers {version('transformers')} does not compute {known.describes} models as they are served; "
            f"{'.'.join(map(str, known.since))} and newer do. Update transformers."
        )

    if not is_torch_available():
        raise RequestError(
            f"transformers {version('transformers')} does not work with torch {torch.__version__}: 5.16 and newer need "
            "torch 2.5. pip install -r requirements-container-older.txt, whose first lines say how torch stays."
        )


def from_pretrained_dtype(dtype: torch.dtype) -> dict[str, torch.dtype]:
    """`from_pretrained`'s keyword for the dtype, which transformers renamed in 4.56."""
    return {"dtype" if transformers_release() >= (4, 56) else "torch_dtype": dtype}


def load_trunk(
    folder: str | Path,
    dtype: torch.dtype,
    device: torch.device,
    *,
    attention: str = "sdpa",
    spread: bool = False,
    memory: dict[int | str, int] | None = None,
    offload_folder: Path | None = None,
) -> torch.nn.Module:
    """The target without its ``lm_head``: ``trunk(ids).last_hidden_state`` is the feature ``[B, T, H]``.

    attention: `attn_implementation` of transformers; eager in place of sdpa with torch 2.1.0, for which transformers
    has no other. spread: place the layers over every card this process sees (70B-class targets) instead of on
    `device`, whose memory each tensor is read into: the host never holds the whole model, however many workers load it.
    memory: bytes that weights may take, by card (default: what leaves room for a batch).
    offload_folder: where layers go that fit on no card; without it they are not accepted, since every batch would read
    them from disk.

    Raises: RequestError where the cards are too small for the target, the device does not compute in that dtype, or
    this transformers leaves weights out.
    """
    from transformers import AutoModel
    from transformers.utils import logging

    logging.set_verbosity_error()  # it would report lm_head as unused, which is the point
    logging.disable_progress_bar()
    config = load_config(folder)
    check_packages(config.family)
    check_computes(dtype, device.type)
    if attention == "sdpa" and TORCH < (2, 1, 1):
        attention = "eager"
    placement: dict[str, Any] = {}
    room: dict[int | str, int] = {}
    if spread:
        room = memory or weight_memory(device.type) or {}
        placement = {"device_map": "auto", "max_memory": room or None}
    elif device.type != "cpu":
        placement = {"device_map": {"": device}}
        if device.type in VISIBILITY_VARIABLE:
            room = {str(device): free_memory(device)}
    if offload_folder:
        placement["offload_folder"] = str(offload_folder)
    try:
        trunk, found = AutoModel.from_pretrained(
            str(folder),
            config=served_config(folder, config),
            **from_pretrained_dtype(dtype),
            attn_implementation=attention,
            output_loading_info=True,
            **placement,
        )
    except ValueError as error:
        if "torch.load" in str(error):
            raise RequestError(
                f"{folder}: transformers {version('transformers')} reads .bin weights with torch 2.6 or newer alone, "
                f"and this is {torch.__version__}. Save them as safetensors (save_pretrained, where such a torch is), "
                "or take another pair of the two."
            ) from None
        if not spread or "offload" not in str(error):
            raise
        raise _too_small(folder, room) from error
    except RuntimeError as error:
        if not room or not is_out_of_memory(error):
            raise
        raise _too_small(folder, room) from error
    if found["missing_keys"]:  # random, and nobody is told: the notes of transformers are off
        raise RequestError(
            f"{folder}: transformers {version('transformers')} does not find {listed(sorted(found['missing_keys']))} "
            f"among the weights: its class of {config.family} models looks for other names. Update transformers."
        )
    outside = {"cpu", "disk"} - {device.type} if not offload_folder else set()
    if spread and outside & {str(place) for place in getattr(trunk, "hf_device_map", {}).values()}:
        raise _too_small(folder, room)
    trunk.requires_grad_(False)
    trunk.eval()
    return trunk


def has_long_rope(config: ModelConfig) -> bool:
    """Whether the target has longrope and is served by default for contexts beyond what it was first trained for."""
    rope = config.rope_scaling or {}
    original = rope.get("original_max_position_embeddings") or config.max_position_embeddings
    return rope.get("rope_type") == "longrope" and config.max_position_embeddings > original


def served_config(folder: str | Path, config: ModelConfig) -> Any:
    """transformers' config of the target, as an engine computes it.

    Of longrope's two sets of factors transformers takes the short one where a batch is short; vLLM takes the long one
    for every sequence as soon as it is to serve longer ones than the original context.

    Raises: RequestError where this transformers does not read it, or would compute another rope.
    """
    from transformers import AutoConfig

    try:
        theirs = AutoConfig.from_pretrained(str(folder))
    except Exception as error:  # of transformers' own kinds, which change from release to release
        said = " ".join(str(error).split())
        raise RequestError(
            f"{folder}/config.json: transformers {version('transformers')} does not read it: {said}. Take the one that "
            "was published with the weights, or correct the value."
        ) from None
    if theirs.model_type != config.family:  # a Mistral with layer_types is a Ministral there, with windows of its own
        raise RequestError(
            f"{folder}/config.json says model_type {config.family!r}, and transformers {version('transformers')} takes "
            f"it for {theirs.model_type!r}, which is not supported. Take out of it what the released config of that "
            "kind of model does not have (layer_types, of a Mistral)."
        )
    if getattr(theirs, "head_dim", 0) is None:  # Mistral's classes of transformers 4 leave it open
        theirs.head_dim = config.head_dim
    theirs.pad_token_id = None  # changes no feature, and need not be in the vocabulary
    if not getattr(theirs, "quantization_config", True):
        del theirs.quantization_config  # empty, which is none
    _check_yarn(config)
    if transformers_release() < (5,) and getattr(theirs, "rope_parameters", None):
        _say_as_transformers_4(theirs, config)
    if has_long_rope(config):
        assert config.rope_scaling
        # Where it stands beside the rope, Llama's class takes the whole context for it.
        original = config.rope_scaling["original_max_position_embeddings"]
        theirs.original_max_position_embeddings = original
        for name in ("rope_scaling", "rope_parameters"):
            if rope := getattr(theirs, name, None):
                rope |= {"short_factor": rope["long_factor"], "original_max_position_embeddings": original}
    return theirs


def _say_as_transformers_4(theirs: Any, config: ModelConfig) -> None:
    """transformers 4 does not read ``rope_parameters``, in which transformers 5 writes all of a rope, nor new names."""
    scaling = dict(config.rope_scaling) if config.rope_scaling else None
    theirs.rope_theta, theirs.rope_scaling = config.rope_theta, scaling
    for key, value in config.own.items():
        setattr(theirs, key, value)


def _check_yarn(config: ModelConfig) -> None:
    """Raises: RequestError where this transformers takes a yarn's context for its original one."""
    rope, positions = config.rope_scaling or {}, config.max_position_embeddings
    original = rope.get("original_max_position_embeddings") or positions
    if rope.get("rope_type") == "yarn" and original != positions and transformers_release() < (4, 57):
        raise RequestError(
            f"the base model has a rope of type 'yarn' over {original:,} original positions, which transformers "
            f"{version('transformers')} takes for one over all {positions:,}: other angles than vLLM's. Update "
            f"transformers to 4.57 or newer, or write max_position_embeddings {original} into a copy of the model's "
            "config.json, with which the angles are right."
        )


def _too_small(folder: str | Path, memory: dict[int | str, int]) -> RequestError:
    room = ", ".join(f"{place}: {size / 1e9:,.2f} GB" for place, size in memory.items())
    return RequestError(
        f"The base model {folder} does not fit on the cards that it was to use (room for weights: {room}). Spread it "
        "over more of them: --used_npus 4 or 8 gives so many to each worker of allocation.py, --spread all that are "
        "visible to eagle.evaluate."
    )


def least_context(config: ModelConfig) -> int:
    """The shortest context to serve that makes an engine compute these features; 0 where all do."""
    if not has_long_rope(config):
        return 0
    assert config.rope_scaling
    return config.rope_scaling["original_max_position_embeddings"] + 1


def load_final_norm(weights: Weights, config: ModelConfig, dtype: torch.dtype, device: torch.device) -> torch.nn.Module:
    """The target's own final norm, as transformers computes it, in that dtype: the feature of its last layer's output.

    Raises: KeyError where the weights lack it.
    """
    from transformers import AutoModel

    with torch.device("meta"):
        trunk = AutoModel.from_config(_plain_config(config))
    family = TARGET_FAMILIES[config.family]
    norm = trunk.get_submodule(family.trunk_norm)
    norm.load_state_dict({"weight": weights[family.norm].to(device=device, dtype=dtype)}, assign=True)
    return norm.requires_grad_(False).eval()


def _plain_config(config: ModelConfig) -> Any:
    """transformers' config without its rope, which has no weights; some compute with what the meta device lacks."""
    from transformers import AutoConfig

    raw = dataclasses.replace(config, rope_scaling=None).to_json()
    # Nor what changes no tensor, and may be no value that transformers takes.
    for key in ("model_type", "rope_theta", "rope_scaling", "rope_parameters", "torch_dtype"):
        raw.pop(key)
    raw["pad_token_id"] = None
    return AutoConfig.for_model(config.family, **raw)


def expected_tensors(config: ModelConfig) -> dict[str, tuple[int, ...]]:
    """The shape of every tensor of the target by its name in a weight file, of ``lm_head`` too unless it is tied.

    Read off transformers' own module; nothing is allocated.
    """
    from transformers import AutoModelForCausalLM

    check_packages(config.family)
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(_plain_config(config))
    shapes = {name: tuple(parameter.shape) for name, parameter in model.named_parameters()}
    family = TARGET_FAMILIES[config.family]
    if config.tie_word_embeddings:
        shapes.pop(family.head, None)
    return family.in_files(shapes)


def trunk_values(config: ModelConfig) -> int:
    """Numbers of values of the target without its ``lm_head``."""
    shapes = expected_tensors(config)
    shapes.pop(TARGET_FAMILIES[config.family].head, None)
    return sum(map(math.prod, shapes.values()))


@dataclass(frozen=True, slots=True)
class TrunkParts:
    """What others than its own forward pass need of a trunk. embedding: ``[V, H]``; norm: the final one's weight."""

    embedding: torch.Tensor
    layers: list[torch.nn.Module]
    norm: torch.Tensor


def parts_of(trunk: torch.nn.Module, config: ModelConfig) -> TrunkParts:
    """The parts of a target's trunk, found as its family names them."""
    family = TARGET_FAMILIES[config.family]
    layers = list(trunk.get_submodule(family.trunk_layers).children())
    embedding, norm = (trunk.get_parameter(f"{name}.weight") for name in (family.trunk_embedding, family.trunk_norm))
    return TrunkParts(embedding, layers, norm)
