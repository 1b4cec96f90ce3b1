"""The two folders in which vLLM loads an EAGLE-1 draft.

    v1   vLLM 0.9 and newer: plain Llama config; no lm_head, no embed_tokens, no fc.bias
    v0   vLLM's V0 engine, up to 0.8: nested config of model_type "eagle", embed_tokens and the target's lm_head

Weights keep the public names. docs/vllm.md says which releases were run and which were read.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator
from typing import Any

import torch

from eagle.drafts.vllm_layout import Exported, Layout, SavedDraft
from eagle.dtypes import dtype_name
from eagle.errors import RequestError
from eagle.target.config import ModelConfig, parse_config
from eagle.target.weights import Weights, read_embedding, read_head

_NOT_IN_V1 = {"lm_head.weight", "embed_tokens.weight", "fc.bias"}


def _v1_config(draft: SavedDraft, dtype: torch.dtype) -> dict[str, Any]:
    return dataclasses.replace(draft.config, dtype=dtype_name(dtype)).to_json(as_llama=True)


def _v0_config(draft: SavedDraft, dtype: torch.dtype) -> dict[str, Any]:
    # The V0 engine knows Qwen2 by its own class; one without biases can only be said as a Llama.
    config = dataclasses.replace(draft.config, dtype=dtype_name(dtype))
    inner = config.to_json(as_llama=not config.qkv_bias)
    outer: dict[str, Any] = {"model_type": "eagle", "architectures": ["EAGLEModel"], "model": inner}
    if "fc.bias" in draft.tensors:
        outer["eagle_fc_bias"] = True
    return outer | {"torch_dtype": dtype_name(dtype)}


def _v1_tensors(draft: SavedDraft, dtype: torch.dtype, base: Weights, target: ModelConfig) -> dict[str, torch.Tensor]:
    """Raises: RequestError for a trained ``fc.bias``, which v1 cannot carry."""
    tensors = dict(draft.tensors)
    bias = tensors.pop("fc.bias", None)  # all zeros: nothing is lost
    if bias is not None and bool(bias.any()):
        raise RequestError(
            f"--draft-path {draft.source} has a trained fc.bias. vLLM 0.9 and newer have no place for it: they drop it "
            "or refuse to load, and a draft without it is accepted far less. Train one without a bias "
            "(eagle.train.main), or use --layout v0 for an old vLLM."
        )
    return _in_dtype(tensors, dtype)


def _v0_tensors(draft: SavedDraft, dtype: torch.dtype, base: Weights, target: ModelConfig) -> dict[str, torch.Tensor]:
    added = {"embed_tokens.weight": read_embedding(base, target), "lm_head.weight": read_head(base, target)}
    return _in_dtype(draft.tensors | added, dtype)


def _in_dtype(tensors: dict[str, torch.Tensor], dtype: torch.dtype) -> dict[str, torch.Tensor]:
    # clone: a tied lm_head shares the embedding's memory, which a safetensors file does not allow
    return {name: tensor.to(dtype).clone().contiguous() for name, tensor in tensors.items()}


def _v1_rules(exported: Exported, expected: dict[str, torch.Tensor]) -> Iterator[str]:
    _, plain, tensors = exported
    if (plain.get("model_type"), plain.get("architectures")) != ("llama", ["LlamaForCausalLM"]):
        yield "a v1 config says model_type 'llama' and architectures ['LlamaForCausalLM']"
    yield from (f"{name} must not be in a v1 draft" for name in sorted(_NOT_IN_V1 & tensors.keys()))
    yield from _layer_rules(plain, tensors)


def _v0_rules(exported: Exported, expected: dict[str, torch.Tensor]) -> Iterator[str]:
    raw, plain, tensors = exported
    if (raw.get("model_type"), raw.get("architectures")) != ("eagle", ["EAGLEModel"]):
        yield "a v0 config is nested: model_type 'eagle', architectures ['EAGLEModel']"
    if not torch.equal(tensors.get("lm_head.weight", torch.empty(0)), expected["lm_head.weight"]):
        yield "lm_head.weight is not the target's"
    yield from _layer_rules(plain, tensors)


def _layer_rules(plain: dict[str, Any], tensors: dict[str, torch.Tensor]) -> Iterator[str]:
    """Biases: those that are declared and those that are there."""
    has_bias = {f"layers.0.self_attn.{name}_proj.bias" in tensors for name in "qkv"}
    try:
        declared = parse_config(plain).qkv_bias
    except RequestError:
        return  # the check of the config has said why
    if has_bias != {declared}:
        yield f"q, k, v biases are {'declared but not' if declared else 'not declared but'} among the tensors"
    if bool(plain.get("attention_bias")) != ("layers.0.self_attn.o_proj.bias" in tensors):
        yield "attention_bias and o_proj.bias must come together"


V1 = Layout(
    name="v1",
    engines="vLLM 0.9 and newer (run on 0.32.0; the loaders of 0.9 to 0.31 were read)",
    loads=lambda release: release >= (0, 9),
    speculative={"method": "eagle"},
    config=_v1_config,
    tensors=_v1_tensors,
    rules=_v1_rules,
)
V0 = Layout(
    name="v0",
    engines="vLLM 0.6.4 to 0.8.5, V0 engine (run on 0.8.5; the loaders of 0.6.4 and 0.7.3 were read)",
    loads=lambda release: release < (0, 9),
    speculative={},
    config=_v0_config,
    tensors=_v0_tensors,
    rules=_v0_rules,
    hint="(vLLM before 0.8: --speculative-model {draft} --num-speculative-tokens 3)",
    inner="model",
    targets=("llama", "qwen2"),
)
