"""The target families: everything in which supported models differ by the ``model_type`` of their config.json.

Who needs to know asks the table; there is no other place that compares family names. A new family is an entry here,
a chat template of its own perhaps, and a test target.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

#: A key of config.json that makes a target unusable -> why, and the cure; None where all is well.
Refusal = Callable[[dict[str, Any]], "str | None"]


#: What to do instead of using a quantized model.
UNQUANTIZED = "Train against the unquantized model it was made from; the draft fits both."

#: The rope types that every supported transformers computes, and the keys each has to bring along.
ROPE_TYPES: dict[str, tuple[str, ...]] = {
    "default": (),
    "linear": ("factor",),
    "dynamic": ("factor",),
    "yarn": ("factor",),
    "longrope": ("short_factor", "long_factor"),
    "llama3": ("factor", "low_freq_factor", "high_freq_factor", "original_max_position_embeddings"),
}


@dataclass(frozen=True, slots=True)
class TargetFamily:
    """One ``model_type``.

    describes: for messages. architecture: transformers' class. max_position_embeddings: what transformers assumes where
    config.json names none. biases: of a raw config, whether q, k and v have biases, and whether o has. keys: the keys
    that say so, from those two and the MLP's, for a config to be written. template_names: what a model is called in
    lower case, or a part of it, and the built-in chat template that those speak whose tokenizer brings none. template:
    a guess at it for the others, by their longest context. refusals: what cannot be used.

    The rest are names. Weights: embedding, head, norm (the final one); marks, three that every fine-tuning moves,
    ``{last}`` in them the last layer's number. Modules of the trunk: trunk_embedding, trunk_layers, trunk_norm.
    """

    name: str
    describes: str
    architecture: str
    max_position_embeddings: int
    biases: Callable[[dict[str, Any]], tuple[bool, bool]]
    keys: Callable[[bool, bool, bool], dict[str, Any]]
    template: Callable[[int], str]
    template_names: tuple[tuple[str, str], ...] = ()
    refusals: tuple[Refusal, ...] = ()
    embedding: str = "model.embed_tokens.weight"
    head: str = "lm_head.weight"
    norm: str = "model.norm.weight"
    marks: tuple[str, ...] = (
        "model.norm.weight",
        "model.layers.0.self_attn.q_proj.weight",
        "model.layers.{last}.mlp.down_proj.weight",
    )
    trunk_embedding: str = "embed_tokens"
    trunk_layers: str = "layers"
    trunk_norm: str = "norm"


def sliding_window(raw: dict[str, Any]) -> str | None:
    # transformers takes a window of 4096 where the key is absent; an explicit null is no window.
    if not (raw.get("use_sliding_window") and raw.get("sliding_window", 4096)):
        return None
    return (
        "use_sliding_window is on; vLLM's EAGLE draft attends to everything, so a draft would not match. Set "
        "use_sliding_window to false (the released Qwen2 configs have it off)."
    )


def quantized(raw: dict[str, Any]) -> str | None:
    # compression_config: what compressed-tensors wrote before it took the common key.
    found = raw.get("quantization_config") or raw.get("compression_config")
    if not found:
        return None
    method = found.get("quant_method") or found.get("format") if isinstance(found, dict) else found
    return f"this is a quantized model ({method}). {UNQUANTIZED}"


def unknown_rope(raw: dict[str, Any]) -> str | None:
    # In transformers' order: the newer key counts where both are there.
    rope = {**(raw.get("rope_scaling") or {}), **(raw.get("rope_parameters") or {})}
    kind = rope.get("rope_type") or rope.get("type") or "default"
    if kind not in ROPE_TYPES:
        return (
            f"the rope type {kind!r} is not known here; expected {', '.join(ROPE_TYPES)}. Features would be computed "
            "with other positions than the model was trained with: use a model whose rope is one of these."
        )
    missing = [key for key in ROPE_TYPES[kind] if rope.get(key) is None]
    if missing:
        return (
            f"its rope of type {kind!r} has no {', '.join(missing)}. config.json is damaged, or was edited: take the "
            "one that was published with the weights."
        )
    return None


def own_code(raw: dict[str, Any]) -> str | None:
    found = raw.get("auto_map")
    if not found:
        return None
    named = ", ".join(map(str, found.values())) if isinstance(found, dict) else str(found)
    return (
        f"the model brings code of its own (auto_map: {named}), which is not run here. Use a conversion of it to plain "
        "Llama or Qwen2; where it is one already, and the code only repeats what transformers has, take auto_map out "
        "of config.json."
    )


def weights_elsewhere(raw: dict[str, Any]) -> str | None:
    found = raw.get("transformers_weights")
    if not found:
        return None
    return (
        f"transformers_weights names {found} as the weights, which only some versions of transformers follow. Name the "
        "file model.safetensors (or model.safetensors.index.json) and take the key out of config.json."
    )


def _llama_biases(raw: dict[str, Any]) -> tuple[bool, bool]:
    every = bool(raw.get("attention_bias", False))
    # qkv_bias is vLLM's own key, in the drafts of Qwen2 targets.
    return every or bool(raw.get("qkv_bias", False)), every


def _llama_keys(qkv_bias: bool, o_bias: bool, mlp_bias: bool) -> dict[str, Any]:
    keys: dict[str, Any] = {"attention_bias": o_bias, "mlp_bias": mlp_bias}
    return keys | {"qkv_bias": True} if qkv_bias and not o_bias else keys


def _llama_template(longest: int) -> str:
    """Llama-1 chat models (their context is 2048) speak Vicuna's; others Llama-2 chat's."""
    return "vicuna" if longest <= 2048 else "llama2"


#: As which vLLM loads every draft, whatever its target.
LLAMA = "llama"
REFUSALS: tuple[Refusal, ...] = (quantized, own_code, unknown_rope, sliding_window, weights_elsewhere)

TARGET_FAMILIES: dict[str, TargetFamily] = {
    family.name: family
    for family in (
        TargetFamily(
            name=LLAMA,
            describes="Llama (1, 2 or a model of the same shape)",
            architecture="LlamaForCausalLM",
            max_position_embeddings=2048,
            biases=_llama_biases,
            keys=_llama_keys,
            template=_llama_template,
            template_names=(("vicuna", "vicuna"), ("llama-2", "llama2"), ("llama2", "llama2"), ("llama_2", "llama2")),
            refusals=REFUSALS,
        ),
        TargetFamily(
            name="qwen2",
            describes="Qwen2 / Qwen2.5",
            architecture="Qwen2ForCausalLM",
            max_position_embeddings=32768,
            biases=lambda raw: (True, False),
            keys=lambda qkv_bias, o_bias, mlp_bias: {},
            template=lambda longest: "chatml",
            template_names=(("qwen", "chatml"),),
            refusals=REFUSALS,
        ),
    )
}
