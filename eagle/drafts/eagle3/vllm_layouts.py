"""The two folders in which vLLM loads an EAGLE-3 draft.

    plain         a Llama config with the draft's keys at the top; SGLang, by reading, loads it with the default layers
    speculators   the form of the speculators library: ``vllm serve FOLDER`` alone serves target and draft

The tensors are the same: the public names, no ``embed_tokens`` (vLLM takes the target's), ``d2t`` as offsets where the
vocabulary is reduced. vLLM loads a wrong draft of either form without a word; the rules here are the ways in which it
does. That a number is not the one of the training no folder shows: `eagle.vllm.self_check` compares with the draft.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch

from eagle.drafts.eagle3.draft_config import AUX_LAYERS, DRAFT_VOCAB, NESTED, NORMED_RESIDUAL, TARGET_WIDTH, VARIANTS
from eagle.drafts.eagle3.public import ATTENTION_BIASES, MLP_BIASES, is_table
from eagle.drafts.vllm_layout import Exported, Layout, SavedDraft
from eagle.dtypes import dtype_name
from eagle.target.config import ModelConfig
from eagle.target.weights import Weights

ARCHITECTURE = "LlamaForCausalLMEagle3"

#: Without them vLLM takes ones.
_NORMS = ("midlayer.input_layernorm", "midlayer.hidden_norm", "midlayer.post_attention_layernorm", "norm")
#: Draft tokens a step that the speculators form proposes to whoever serves it.
SPECULATIVE_TOKENS = 3
#: Other than three layers vLLM only believes where their number is said as well.
LAYER_COUNT = "num_aux_hidden_states"
_TABLES = ("d2t", "t2d")


def _layer(draft: SavedDraft, dtype: torch.dtype) -> dict[str, Any]:
    layer = dataclasses.replace(draft.config, dtype=dtype_name(dtype), extra={}).to_json(as_llama=True)
    return layer | {LAYER_COUNT: len(draft.config.extra[AUX_LAYERS])}


def _plain_config(draft: SavedDraft, dtype: torch.dtype) -> dict[str, Any]:
    return _layer(draft, dtype) | {"architectures": [ARCHITECTURE]} | draft.config.extra


def _speculators_config(draft: SavedDraft, dtype: torch.dtype) -> dict[str, Any]:
    # A model_type at the top would make it a plain one.
    return {
        "architectures": ["Eagle3Speculator"],
        "speculators_model_type": "eagle3",
        "speculators_version": "0.3.0",
        **draft.config.extra,
        "tie_word_embeddings": False,
        "torch_dtype": dtype_name(dtype),
        "transformer_layer_config": _layer(draft, dtype),
        "speculators_config": {
            "algorithm": "eagle3",
            "default_proposal_method": "greedy",
            "proposal_methods": [{"proposal_type": "greedy", "speculative_tokens": SPECULATIVE_TOKENS}],
            "verifier": {"name_or_path": str(draft.base), "architectures": list(draft.base_architectures)},
        },
    }


def _tensors(draft: SavedDraft, dtype: torch.dtype, base: Weights, target: ModelConfig) -> dict[str, torch.Tensor]:
    # clone: a tied lm_head shares the embedding's memory, which a safetensors file does not allow
    found = {
        name: (tensor.to(dtype) if tensor.is_floating_point() else tensor).clone().contiguous()
        for name, tensor in draft.tensors.items()
    }
    offsets = found.pop("d2t")
    if len(offsets) == target.vocab_size:
        return found  # every token is its own: vLLM has no place for a table then
    ids = torch.arange(len(offsets)) + offsets
    drafted = torch.zeros(target.vocab_size, dtype=torch.bool)  # vLLM takes d2t, others read this
    drafted[ids] = True
    return found | {"d2t": offsets, "t2d": drafted}


def _plain_rules(exported: Exported, expected: dict[str, torch.Tensor]) -> Iterator[str]:
    raw, plain, tensors = exported
    if (raw.get("model_type"), raw.get("architectures")) != ("llama", [ARCHITECTURE]):
        yield f"a plain config says model_type 'llama' and architectures ['{ARCHITECTURE}']"
    yield from _rules(raw, plain, tensors)


def _speculators_rules(exported: Exported, expected: dict[str, torch.Tensor]) -> Iterator[str]:
    raw, plain, tensors = exported
    if "model_type" in raw or raw.get("speculators_model_type") != "eagle3":
        yield "a speculators config has speculators_model_type 'eagle3' and no model_type at the top"
    if plain.get("model_type") != "llama":
        yield f"model_type of the layer is {plain.get('model_type')!r}, a draft's is 'llama'"
    if NORMED_RESIDUAL not in raw:
        yield f"{NORMED_RESIDUAL} must be said: this form takes true where it is not"
    served = raw.get("speculators_config") or {}
    name = (served.get("verifier") or {}).get("name_or_path")
    if not name or not Path(name).is_absolute():
        yield f"the base model is {name!r} in speculators_config's verifier; its whole path must be there"
    if not (served.get("proposal_methods") or [{}])[0].get("speculative_tokens"):
        yield "speculators_config's proposal_methods do not say how many speculative_tokens"
    yield from _rules(raw, plain, tensors)


def _rules(raw: dict[str, Any], plain: dict[str, Any], tensors: dict[str, torch.Tensor]) -> Iterator[str]:
    """What both forms share. raw: where the draft's own keys are; plain: the layer's numbers."""
    layers, size, width = raw.get(AUX_LAYERS), raw.get(DRAFT_VOCAB), plain.get("hidden_size", 0)
    vocabulary = plain.get("vocab_size", 0)
    for where in {id(raw): raw, id(plain): plain}.values():
        yield from (f"{key} is said, which this draft is not" for key in (*VARIANTS, NESTED) if where.get(key))
    if (named := raw.get(TARGET_WIDTH, width)) != width:
        yield f"{TARGET_WIDTH} is {named}, the draft's own width is {width}"
    for key in ("rms_norm_eps", "max_position_embeddings", "num_key_value_heads", "head_dim"):
        if plain.get(key) is None:
            yield f"{key} must be said"
    yield from (f"{name}.weight is missing, and vLLM takes ones" for name in _NORMS if f"{name}.weight" not in tensors)
    yield from _bias_rules(plain, tensors)
    if plain.get("tie_word_embeddings"):
        yield "tie_word_embeddings must be false: the draft's head is its own"
    if not layers or list(layers) != sorted(set(layers)):
        yield f"{AUX_LAYERS} is {layers}; it names each layer once, ascending"
        return
    if plain.get(LAYER_COUNT) != len(layers):
        yield f"{LAYER_COUNT} is {plain.get(LAYER_COUNT)}, {AUX_LAYERS} names {len(layers)}"
    heads, pairs, head_dim = (plain.get(key) or 0 for key in ("num_attention_heads", "num_key_value_heads", "head_dim"))
    shapes = {
        "fc.weight": (width, len(layers) * width),
        "lm_head.weight": (size, width),
        "midlayer.self_attn.q_proj.weight": (heads * head_dim, 2 * width),
        "midlayer.self_attn.k_proj.weight": (pairs * head_dim, 2 * width),
        "midlayer.self_attn.v_proj.weight": (pairs * head_dim, 2 * width),
        "midlayer.self_attn.o_proj.weight": (width, heads * head_dim),
        **({"d2t": (size,), "t2d": (vocabulary,)} if size != vocabulary else {}),
    }
    for name, shape in shapes.items():
        if name not in tensors:
            yield f"{name} is missing"
        elif tuple(tensors[name].shape) != shape:
            yield f"{name} is {list(tensors[name].shape)}, its config says {list(shape)}"
    if size == vocabulary:
        yield from (f"{name} has no place over the whole vocabulary" for name in _TABLES if name in tensors)
    elif tensors.keys() >= set(_TABLES) and len(tensors["t2d"]) == vocabulary:
        offsets = tensors["d2t"]
        if offsets.dtype != torch.int64 or not is_table(offsets, vocabulary):
            yield "d2t holds no offsets (int64, i + d2t[i] ascending) of tokens of the target"
        elif not torch.equal(tensors["t2d"].nonzero().flatten(), torch.arange(len(offsets)) + offsets):
            yield "t2d and d2t name different tokens"


def _bias_rules(plain: dict[str, Any], tensors: dict[str, torch.Tensor]) -> Iterator[str]:
    """vLLM's layer has all four of its attention's biases, by attention_bias, or none; an fc.bias it drops."""
    if "fc.bias" in tensors:
        yield "fc.bias is dropped by vLLM"
    if "qkv_bias" in plain:
        yield "qkv_bias is not read in an EAGLE-3 draft"
    for key, names in (("attention_bias", ATTENTION_BIASES), ("mlp_bias", MLP_BIASES)):
        there = [name for name in names if name in tensors]
        if plain.get(key) and len(there) < len(names):
            yield f"{key} declares biases that are not among the tensors: {', '.join(sorted({*names} - {*there}))}"
        elif there and not plain.get(key):
            yield f"{key} does not declare {', '.join(there)}"


PLAIN = Layout(
    name="plain",
    engines="vLLM with EAGLE-3 (run on 0.32.0), and by reading SGLang where the draft reads the default layers",
    loads=lambda release: release >= (0, 9),
    speculative={"method": "eagle3"},
    config=_plain_config,
    tensors=_tensors,
    rules=_plain_rules,
)
SPECULATORS = Layout(
    name="speculators",
    engines="vLLM that reads the speculators library's form (run on 0.32.0)",
    loads=lambda release: release >= (0, 11),
    speculative={"method": "eagle3"},
    config=_speculators_config,
    tensors=_tensors,
    rules=_speculators_rules,
    hint="(or both by the draft's folder alone, whose config.json names the base model: vllm serve {draft}{flags})",
    inner="transformer_layer_config",
    defaults={NORMED_RESIDUAL: True},
)
