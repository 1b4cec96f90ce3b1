"""What an export must be, rule by rule, checked on the files as they lie on disk.

Every rule stands for a way in which vLLM loads a draft silently and accepts nothing, or refuses it.
"""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open

from eagle.drafts.saved import WEIGHTS_FILE
from eagle.drafts.vllm_layout import Layout
from eagle.errors import RequestError, WorkError
from eagle.files import read_json
from eagle.target.config import ModelConfig, parse_config

#: What vLLM builds the layer from, and must find as the target has it.
_LAYER_FIELDS = (
    "hidden_size",
    "intermediate_size",
    "num_attention_heads",
    "num_key_value_heads",
    "head_dim",
    "vocab_size",
    "rms_norm_eps",
    "max_position_embeddings",
    "rope_scaling",
    "hidden_act",
    "qkv_bias",
    "o_bias",
    "mlp_bias",
)


def check_export(folder: Path, layout: Layout, config: ModelConfig, expected: dict[str, torch.Tensor]) -> None:
    """Read an export back and check it: the rules of every layout here, and those of its own.

    config: the draft's, in the target's own numbers. expected: the tensors that were to be written.

    Raises: WorkError naming every rule that does not hold.
    """
    raw = read_json(folder / "config.json", "an exported config.json")
    plain = raw.get(layout.inner, {}) if layout.inner else raw
    with safe_open(folder / WEIGHTS_FILE, framework="pt") as file:
        tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118  (not a dict)
    broken = [*_config_rules(raw, plain, config), *_tensor_rules(tensors, expected)]
    broken += layout.rules((raw, plain, tensors), expected)
    if broken:
        raise WorkError(
            f"The self-check of the {layout.name} export failed, so nothing was written: {'; '.join(broken)}. A draft "
            "like this would load in vLLM and never be accepted."
        )


def _config_rules(raw: dict[str, Any], plain: dict[str, Any], config: ModelConfig) -> Iterator[str]:
    if "layer_types" in plain:
        yield "layer_types must not be in a one-layer config"
    if plain.get("num_hidden_layers") != 1:
        yield f"num_hidden_layers is {plain.get('num_hidden_layers')}, a draft has 1"
    theta, parameters = plain.get("rope_theta"), plain.get("rope_parameters") or {}
    if not theta == parameters.get("rope_theta") == config.rope_theta:
        yield (
            f"rope_theta is {theta}, in rope_parameters {parameters.get('rope_theta')}; both must be the target's "
            f"{config.rope_theta}"
        )
    for key, value in config.extra.items():
        if (found := raw.get(key, plain.get(key))) != value:
            yield f"{key} is {found!r}, the draft's is {value!r}"
    try:
        written = parse_config(plain)
    except RequestError as error:
        yield f"the config cannot be read back: {error}"
        return
    for name in _LAYER_FIELDS:
        if getattr(written, name) != getattr(config, name):
            yield f"{name} reads back as {getattr(written, name)!r}, it should be {getattr(config, name)!r}"


def _tensor_rules(tensors: dict[str, torch.Tensor], expected: dict[str, torch.Tensor]) -> Iterator[str]:
    for name in sorted(expected.keys() ^ tensors.keys()):
        yield f"{name} is {'missing' if name in expected else 'extra'}"
    for name in sorted(expected.keys() & tensors.keys()):
        tensor = tensors[name]
        if (tensor.shape, tensor.dtype) != (expected[name].shape, expected[name].dtype):
            yield f"{name} is {list(tensor.shape)} {tensor.dtype}"
        elif tensor.is_floating_point() and not torch.isfinite(tensor).all():
            yield f"{name} holds NaN or infinite values"
        elif not torch.equal(tensor, expected[name]):
            yield f"{name} did not come back as it was written"
    if len({tensor.dtype for tensor in tensors.values() if tensor.is_floating_point()}) > 1:
        yield "the tensors have different dtypes"
