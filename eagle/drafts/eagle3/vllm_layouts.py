"""The two folders in which vLLM loads an EAGLE-3 draft.

    plain         a Llama config with the draft's keys at the top; SGLang loads it too
    speculators   the form of the speculators library: ``vllm serve FOLDER`` alone serves target and draft

The tensors are the same: the public names, no ``embed_tokens`` (vLLM takes the target's), ``d2t`` as offsets. vLLM
loads a wrong draft of either form without a word; the rules here are the ways in which it does.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator
from typing import Any

import torch

from eagle.drafts.eagle3.draft_config import AUX_LAYERS, DRAFT_VOCAB, NORMED_RESIDUAL
from eagle.drafts.vllm_layout import Exported, Layout, SavedDraft
from eagle.dtypes import dtype_name
from eagle.target.config import ModelConfig
from eagle.target.weights import Weights

ARCHITECTURE = "LlamaForCausalLMEagle3"

#: Without them vLLM takes ones.
_NORMS = ("midlayer.input_layernorm", "midlayer.hidden_norm", "midlayer.post_attention_layernorm", "norm")
#: Draft tokens a step that the speculators form proposes to whoever serves it.
SPECULATIVE_TOKENS = 3


def _layer(draft: SavedDraft, dtype: torch.dtype) -> dict[str, Any]:
    return dataclasses.replace(draft.config, dtype=dtype_name(dtype), extra={}).to_json(as_llama=True)


def _own(draft: SavedDraft) -> dict[str, Any]:
    """The draft's own keys. Other than three layers vLLM only believes where their number is said as well."""
    return draft.config.extra | {"num_aux_hidden_states": len(draft.config.extra[AUX_LAYERS])}


def _plain_config(draft: SavedDraft, dtype: torch.dtype) -> dict[str, Any]:
    return _layer(draft, dtype) | {"architectures": [ARCHITECTURE]} | _own(draft)


def _speculators_config(draft: SavedDraft, dtype: torch.dtype) -> dict[str, Any]:
    # A model_type at the top would make it a plain one.
    return {
        "architectures": ["Eagle3Speculator"],
        "speculators_model_type": "eagle3",
        "speculators_version": "0.3.0",
        **_own(draft),
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
    found = {
        name: (tensor.to(dtype) if tensor.is_floating_point() else tensor).clone().contiguous()
        for name, tensor in draft.tensors.items()
    }
    ids = torch.arange(len(found["d2t"])) + found["d2t"]
    found["t2d"] = torch.zeros(target.vocab_size, dtype=torch.bool)  # vLLM takes d2t, others read this
    found["t2d"][ids] = True
    return found


def _plain_rules(exported: Exported, expected: dict[str, torch.Tensor]) -> Iterator[str]:
    raw, plain, tensors = exported
    if (raw.get("model_type"), raw.get("architectures")) != ("llama", [ARCHITECTURE]):
        yield f"a plain config says model_type 'llama' and architectures ['{ARCHITECTURE}']"
    yield from _rules(raw, plain, tensors)


def _speculators_rules(exported: Exported, expected: dict[str, torch.Tensor]) -> Iterator[str]:
    raw, plain, tensors = exported
    if "model_type" in raw or raw.get("speculators_model_type") != "eagle3":
        yield "a speculators config has speculators_model_type 'eagle3' and no model_type at the top"
    if NORMED_RESIDUAL not in raw:
        yield f"{NORMED_RESIDUAL} must be said: this form takes true where it is not"
    if not raw.get("speculators_config", {}).get("verifier", {}).get("name_or_path"):
        yield "the base model is not named in speculators_config"
    yield from _rules(raw, plain, tensors)


def _rules(raw: dict[str, Any], plain: dict[str, Any], tensors: dict[str, torch.Tensor]) -> Iterator[str]:
    """What both forms share. raw: where the draft's own keys are; plain: the layer's numbers."""
    layers, size, width = raw.get(AUX_LAYERS), raw.get(DRAFT_VOCAB), plain.get("hidden_size", 0)
    vocabulary = plain.get("vocab_size", 0)
    yield from (f"{name}.weight is missing, and vLLM takes ones" for name in _NORMS if f"{name}.weight" not in tensors)
    if not layers or list(layers) != sorted(set(layers)):
        yield f"{AUX_LAYERS} is {layers}; it names each layer once, ascending"
        return
    for name, shape in {
        "fc.weight": (width, len(layers) * width),
        "lm_head.weight": (size, width),
        "d2t": (size,),
        "t2d": (vocabulary,),
        "midlayer.self_attn.q_proj.weight": (plain.get("num_attention_heads", 0) * plain.get("head_dim", 0), 2 * width),
    }.items():
        if name not in tensors:
            yield f"{name} is missing"
        elif tuple(tensors[name].shape) != shape:
            yield f"{name} is {list(tensors[name].shape)}, its config says {list(shape)}"
    if {"d2t", "t2d"} <= tensors.keys() and len(tensors["t2d"]) == vocabulary:
        ids = torch.arange(len(tensors["d2t"])) + tensors["d2t"]
        inside = bool(len(ids)) and int(ids.min()) >= 0 and int(ids.max()) < vocabulary
        if tensors["d2t"].dtype != torch.int64 or not inside or not bool((ids.diff() > 0).all()):
            yield "d2t holds no offsets (int64, i + d2t[i] ascending) of tokens of the target"
        elif not torch.equal(tensors["t2d"].nonzero().flatten(), ids):
            yield "t2d and d2t name different tokens"
    yield from (f"{name}: a Llama draft's layer has no biases" for name in sorted(tensors) if name.endswith(".bias"))
    if plain.get("attention_bias") or plain.get("qkv_bias"):
        yield "biases are declared that are not among the tensors"
    if plain.get("tie_word_embeddings"):
        yield "tie_word_embeddings must be false: the draft's head is its own"


PLAIN = Layout(
    name="plain",
    engines="vLLM with EAGLE-3 (run on 0.32.0), and by reading SGLang",
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
    hint="(or the two of them by the draft's folder alone: vllm serve {draft})",
    inner="transformer_layer_config",
)
