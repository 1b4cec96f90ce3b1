"""EAGLE-3's config: a single Llama layer of the target's width, the layers it reads, its own vocabulary's size."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch

from eagle.drafts.choices import DraftChoices
from eagle.drafts.layers import biases_among
from eagle.errors import RequestError
from eagle.target.config import ModelConfig, load_config
from eagle.target.families import LLAMA, TARGET_FAMILIES
from eagle.target.features import aux_name
from eagle.target.quantization import Use

#: Keys of config.json, as vLLM reads them.
AUX_LAYERS = "eagle_aux_hidden_state_layer_ids"
DRAFT_VOCAB = "draft_vocab_size"
NORMED_RESIDUAL = "norm_before_residual"
#: Variants of the network that some trainers make and that are not read here.
VARIANTS = ("norm_output", "norm_before_fc", "fc_norm", "parallel_drafting")
#: What a config may say beside it: an object with some of these keys in it, and numbers that are read nowhere else.
NESTED, TARGET_WIDTH, SCALE = "eagle_config", "target_hidden_size", "logit_scale"
CONFIG_KEYS = (AUX_LAYERS, DRAFT_VOCAB, NORMED_RESIDUAL, *VARIANTS, NESTED, TARGET_WIDTH, SCALE)

#: Tokens that a draft chooses among unless told otherwise: those of nearly all positions, at a fraction of the cost.
DEFAULT_DRAFT_VOCAB = 32_000


def default_aux_layers(layers: int) -> tuple[int, ...]:
    """vLLM's own choice for a target of so many layers: near its beginning, middle and end.

    Raises: RequestError where they are not three.
    """
    found = (2, layers // 2, layers - 3)
    if len(set(found)) < 3 or min(found) < 0 or list(found) != sorted(found):
        raise RequestError(
            f"the base model has {layers} layers, too few for EAGLE-3's usual choice (2, the middle one, the third "
            "from the end). Name the layers whose inputs the draft is to read: --aux_layers 0,1,2, say."
        )
    return found


def check_aux_layers(chosen: tuple[int, ...], layers: int, flag: str = "--aux_layers") -> tuple[int, ...]:
    """Raises: RequestError for layers that are not there, or not in ascending order."""
    shown = ",".join(map(str, chosen))
    outside = [number for number in chosen if not 0 <= number < layers]
    if outside:
        raise RequestError(
            f"{flag} {shown}: the base model has the layers 0 to {layers - 1}; there is no {outside[0]}. A number "
            "means the input of that layer, as in vLLM."
        )
    if list(chosen) != sorted(set(chosen)):
        right = ",".join(map(str, sorted(set(chosen))))
        raise RequestError(
            f"{flag} {shown}: expected each layer once, in ascending order, as vLLM reads them: {right}."
        )
    return chosen


def check_handed_over(layers: Sequence[int], target: ModelConfig, flag: str) -> None:
    """Raises: RequestError for a layer whose input vLLM does not hand over to a draft of that target."""
    family = TARGET_FAMILIES[target.family]
    if layers[0] < family.first_aux_layer:
        raise RequestError(
            f"{flag} {','.join(map(str, layers))}: vLLM does not hand over the input of layer {layers[0]} of "
            f"{family.describes} models. Name layers from {family.first_aux_layer} on."
        )


def aux_feature(config: ModelConfig) -> str:
    """The name of the features that a draft of this config reads."""
    return aux_name(config.extra[AUX_LAYERS])


def draft_config_for(target: ModelConfig, configpath: Path | None, choices: DraftChoices) -> ModelConfig:
    """The draft's config: a Llama layer of the target's sizes without biases, or of those in the user's file.

    The file may be the target's own config.json or a published EAGLE-3 draft's: its layer's sizes, the layers it reads
    and its vocabulary are taken; the target's width, vocabulary, rope and context are what they are.

    Raises: RequestError for what does not fit the target.
    """
    given = load_config(configpath, CONFIG_KEYS, Use.SERVED) if configpath else None
    shape = given or target
    extra: dict[str, Any] = {}
    if given is not None:
        extra, variants = _said_by(given)
        wrong = given.draft().differences(target.draft(), ("hidden_size", "vocab_size", "hidden_act"))
        if given.num_hidden_layers != 1:
            wrong.append(f"num_hidden_layers is {given.num_hidden_layers}, a draft has 1")
        wrong += [f"{variant} is said, which is not read here" for variant in variants]
        wrong += [
            f"{name} is {extra[name]!r}, expected {expected}"
            for name, expected, is_right in (
                (AUX_LAYERS, "a list of layers", _is_list_of_layers),
                (DRAFT_VOCAB, "a whole number", lambda size: type(size) is int),
            )
            if extra.get(name) is not None and not is_right(extra[name])
        ]
        if wrong:
            raise RequestError(f"{configpath}, the draft's config, does not fit the base model: {'; '.join(wrong)}.")
    count = target.num_hidden_layers
    said = choices.aux_layers is None and extra.get(AUX_LAYERS)
    layers = choices.aux_layers or said or choices.held_layers or default_aux_layers(count)
    flag = f"{configpath}: {AUX_LAYERS}" if said else "--aux_layers"
    layers = check_aux_layers(tuple(layers), count, flag)
    check_handed_over(layers, target, flag)
    size, flag = choices.draft_vocab_size, "--draft_vocab_size"
    if size is None and extra.get(DRAFT_VOCAB) is not None:
        size, flag = extra[DRAFT_VOCAB], f"{configpath}: {DRAFT_VOCAB}"
    if size is None:
        size = min(DEFAULT_DRAFT_VOCAB, target.vocab_size)
    if not 1 <= size <= target.vocab_size:
        raise RequestError(
            f"{flag} {size}: expected 1 to {target.vocab_size:,}, the size of the base model's vocabulary."
        )
    return dataclasses.replace(
        target.draft(),
        family=LLAMA,
        tie_word_embeddings=target.shares_head,
        logit_scale=1.0,  # its own head gives the target's logits as they are
        intermediate_size=shape.intermediate_size,
        num_attention_heads=shape.num_attention_heads,
        num_key_value_heads=shape.num_key_value_heads,
        head_dim=shape.head_dim,
        qkv_bias=False,
        o_bias=False,
        mlp_bias=False,
        extra={
            AUX_LAYERS: list(layers),
            DRAFT_VOCAB: size,
            NORMED_RESIDUAL: bool(extra.get(NORMED_RESIDUAL, False)),
        },
    )


def _is_list_of_layers(found: object) -> bool:
    return isinstance(found, list) and bool(found) and all(type(layer) is int for layer in found)


def _said_by(config: ModelConfig) -> tuple[dict[str, Any], list[str]]:
    """What a config says of the draft, be it in its `NESTED` object, and the variants that it says, in words."""
    said = {key: value for key, value in config.extra.items() if value is not None}
    nested, variants = said.pop(NESTED, None) or {}, []
    if not isinstance(nested, dict):
        variants.append(f"{NESTED} {nested!r}")
        nested = {}
    inner = {key: nested[key] for key in (AUX_LAYERS, "norm_before_fc") if nested.get(key)}
    layers = inner.get(AUX_LAYERS)
    if isinstance(layers, list) and _is_list_of_layers(layers) and layers[0] == 1:
        # SpecForge's and Model Optimizer's count the layers whose outputs are read, and begin with 1; others mean
        # inputs, as vLLM does. SGLang tells them apart like this (sgl-project/sglang#25454).
        inner[AUX_LAYERS] = [layer + 1 for layer in layers]
    said = inner | said
    variants += [name for name in VARIANTS if said.pop(name, False)]
    if not nested.get("use_aux_hidden_state", True):
        variants.append("use_aux_hidden_state false")
    if (width := said.pop(TARGET_WIDTH, config.hidden_size)) != config.hidden_size:
        variants.append(f"{TARGET_WIDTH} {width} beside its own hidden_size {config.hidden_size}")
    if (scale := said.pop(SCALE, 1.0)) != 1.0:
        variants.append(f"{SCALE} {scale}")
    return said, variants


def completed_config(config: ModelConfig, tensors: Mapping[str, torch.Tensor], layers: int | None) -> ModelConfig:
    """A saved draft's config with all of its own keys, whoever saved it: what it does not say, vLLM takes so.

    tensors: the draft's. layers: of the target, where it is known.

    Raises: RequestError for a variant that is not read here, or layers that the target has not.
    """
    said, variants = _said_by(config)
    if variants:
        raise RequestError(
            f"the EAGLE-3 draft says {', '.join(variants)}, which is not read here; expected the plain network. vLLM "
            "serves it as it is."
        )
    drafted = tensors.get("lm_head.weight", tensors.get("d2t"))
    own = {
        AUX_LAYERS: _layers_read(said.get(AUX_LAYERS), layers),
        DRAFT_VOCAB: said.get(DRAFT_VOCAB, config.vocab_size if drafted is None else len(drafted)),
        NORMED_RESIDUAL: bool(said.get(NORMED_RESIDUAL, False)),
    }
    return dataclasses.replace(config, extra=own, **biases_among(tensors))


def _layers_read(said: object, layers: int | None) -> list[int]:
    """The layers that a saved draft reads. layers: of the target, None where it is not known."""
    if said:
        if not _is_list_of_layers(said):
            raise RequestError(f"the draft's config.json: {AUX_LAYERS} is {said!r}, expected a list of layers.")
        assert isinstance(said, list)
        return list(said if layers is None else check_aux_layers(tuple(said), layers, f"the draft's {AUX_LAYERS}"))
    if layers is None:
        raise RequestError(f"the draft's config.json has no {AUX_LAYERS}, and the base model is not known.")
    try:
        return list(default_aux_layers(layers))
    except RequestError:
        raise RequestError(
            f"the draft's config.json has no {AUX_LAYERS}, and the base model has {layers} layers, too few for "
            "EAGLE-3's usual choice. Write the layers that it was trained with into its config.json."
        ) from None
