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


@dataclass(frozen=True, slots=True)
class TargetFamily:
    """One ``model_type``.

    describes: for messages. architecture: transformers' class. max_position_embeddings: what transformers assumes where
    config.json names none. biases: of a raw config, whether q, k and v have biases, and whether o has. keys: the keys
    that say so, from those two and the MLP's, for a config to be written. template_names: what a model is called in
    lower case, or a part of it, and the built-in chat template that those speak whose tokenizer brings none. template:
    a guess at it for the others, by their longest context. refusals: what cannot be used.

    The rest are names. Weights: embedding, head, final_norm. Modules of the trunk: trunk_embedding, trunk_layers,
    trunk_norm.
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
    final_norm: str = "model.norm.weight"
    trunk_embedding: str = "embed_tokens"
    trunk_layers: str = "layers"
    trunk_norm: str = "norm"

    def marks(self, layers: int) -> tuple[str, ...]:
        """Three weights that every fine-tuning moves, of a model with so many layers."""
        return (
            self.final_norm,
            "model.layers.0.self_attn.q_proj.weight",
            f"model.layers.{layers - 1}.mlp.down_proj.weight",
        )


def sliding_window(raw: dict[str, Any]) -> str | None:
    # transformers takes a window of 4096 where the key is absent; an explicit null is no window.
    if not (raw.get("use_sliding_window") and raw.get("sliding_window", 4096)):
        return None
    return (
        "use_sliding_window is on; vLLM's EAGLE draft attends to everything, so a draft would not match. Set "
        "use_sliding_window to false (the released Qwen2 configs have it off)."
    )


def quantized(raw: dict[str, Any]) -> str | None:
    found = raw.get("quantization_config")
    if not found:
        return None
    method = found.get("quant_method") if isinstance(found, dict) else found
    return (
        f"this is a quantized model ({method}). Train against the unquantized model it was made from; the draft fits "
        "both."
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


TARGET_FAMILIES: dict[str, TargetFamily] = {
    family.name: family
    for family in (
        TargetFamily(
            name="llama",
            describes="Llama (1, 2 or a model of the same shape)",
            architecture="LlamaForCausalLM",
            max_position_embeddings=2048,
            biases=_llama_biases,
            keys=_llama_keys,
            template=_llama_template,
            template_names=(("vicuna", "vicuna"), ("llama-2", "llama2"), ("llama2", "llama2"), ("llama_2", "llama2")),
            refusals=(sliding_window, quantized),
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
            refusals=(sliding_window, quantized),
        ),
    )
}
