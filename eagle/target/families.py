"""The target families: everything in which supported models differ by the ``model_type`` of their config.json.

Who needs to know asks the table; there is no other place that compares family names. A new family is an entry here,
a chat template of its own perhaps, and a row in the tests that compare it with vLLM (docs/targets.md).
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

from eagle.target import dialects
from eagle.target.dialects import Raw, Shapes
from eagle.target.refusals import (
    EVERY,
    Refusal,
    both_directions,
    odd_window,
    optional_window,
    other_code_than_phi3s,
    soft_cap,
    unknown_rope,
    unread_window,
    weights_elsewhere,
)

#: As which vLLM loads every draft, whatever its target.
LLAMA = "llama"


def _llama_biases(raw: Raw) -> tuple[bool, bool]:
    every = bool(raw.get("attention_bias", False))
    # qkv_bias is vLLM's own key, in the drafts of Qwen2 targets.
    return every or bool(raw.get("qkv_bias", False)), every


def _llama_keys(qkv_bias: bool, o_bias: bool, mlp_bias: bool) -> dict[str, Any]:
    keys: dict[str, Any] = {"attention_bias": o_bias, "mlp_bias": mlp_bias}
    return keys | {"qkv_bias": True} if qkv_bias and not o_bias else keys


@dataclass(frozen=True, slots=True)
class TargetFamily:
    """One ``model_type``.

    describes: for messages. architecture: transformers' class. since: the transformers release that has it first.

    config.json. max_position_embeddings, rope_theta, rms_norm_eps, tied: what transformers assumes where it names none.
    needed: keys that it must name. understood: the config in Llama's words, where the family has words of its own.
    own_keys: of what `understood` gives, the keys beside the common ones that change what the model computes. divisor:
    the key of a number that logits are divided by. biases: whether q, k and v have biases, and whether o has. keys: the
    keys that say so, from those two and the MLP's, for a config to be written. refusals: what cannot be used.

    The draft is a Llama layer. as_itself: a config of this family can say all of that layer, so that checkpoints do.
    serves: by vLLM's method for a draft, the model_impl that the target has to be served with (``auto``: vLLM's own
    choice); a method that is not there cannot be used with the family. first_aux_layer: the first layer whose input
    vLLM hands over to an EAGLE-3 draft (its transformers backend has none of the embeddings). scales_embeddings:
    whether the model multiplies them, which a draft is not to get. window: the key of a sliding window of all layers,
    which vLLM gives the draft's layer too.

    Chat. template_names: what a model is called in lower case, or a part of it, and the built-in chat template that
    those speak whose tokenizer brings none. template: a guess at it for the others, by their longest context; None: it
    cannot be guessed.

    Trunk. plain: every layer is Llama's and attends to all that went before. norm_offset: what a norm adds to its
    weight. in_files: from the module's tensors to those of the weight files, shapes by name.

    The rest are names. Weights: embedding, head, norm (the final one); marks, three that every fine-tuning moves,
    ``{last}`` in them the last layer's number. Modules of the trunk: trunk_embedding, trunk_layers, trunk_norm.
    """

    name: str
    describes: str
    architecture: str
    max_position_embeddings: int
    template: Callable[[int], str | None] = lambda longest: None
    template_names: tuple[tuple[str, str], ...] = ()
    since: tuple[int, int] = (4, 45)
    rope_theta: float = 10000.0
    rms_norm_eps: float = 1e-6
    tied: bool = False
    needed: tuple[str, ...] = ()
    understood: Callable[[Raw], Raw] = dict
    own_keys: tuple[str, ...] = ()
    divisor: str | None = None
    biases: Callable[[Raw], tuple[bool, bool]] = _llama_biases
    keys: Callable[[bool, bool, bool], dict[str, Any]] = _llama_keys
    refusals: tuple[Refusal, ...] = EVERY
    as_itself: bool = False
    serves: Mapping[str, str] = field(default_factory=lambda: {"eagle": "auto", "eagle3": "auto"})
    first_aux_layer: int = 0
    scales_embeddings: bool = False
    window: str | None = None
    plain: bool = False
    norm_offset: float = 0.0
    in_files: Callable[[Shapes], Shapes] = dict
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


def _llama_template(longest: int) -> str | None:
    """Llama-1 chat models (their context is 2048) speak Vicuna's, Llama-2 chat's have 4096; Llama-3's bring theirs."""
    return "vicuna" if longest <= 2048 else "llama2" if longest <= 4096 else None


def _chatml(longest: int) -> str | None:
    return "chatml"


TARGET_FAMILIES: dict[str, TargetFamily] = {
    family.name: family
    for family in (
        TargetFamily(
            name=LLAMA,
            describes="Llama (1, 2, 3 or a model of the same shape)",
            architecture="LlamaForCausalLM",
            max_position_embeddings=2048,
            template=_llama_template,
            template_names=(("vicuna", "vicuna"), ("llama-2", "llama2"), ("llama2", "llama2"), ("llama_2", "llama2")),
            refusals=(*EVERY, optional_window, unread_window),
            as_itself=True,
            plain=True,
        ),
        TargetFamily(
            name="qwen2",
            describes="Qwen2 / Qwen2.5",
            architecture="Qwen2ForCausalLM",
            max_position_embeddings=32768,
            biases=lambda raw: (True, False),
            keys=lambda qkv_bias, o_bias, mlp_bias: {},
            template=_chatml,
            template_names=(("qwen", "chatml"),),
            refusals=(*EVERY, optional_window),
            as_itself=True,
            plain=True,
        ),
        TargetFamily(
            name="qwen3",
            describes="Qwen3",
            architecture="Qwen3ForCausalLM",
            since=(4, 51),
            max_position_embeddings=32768,
            needed=("head_dim", "num_key_value_heads"),
            refusals=(*EVERY, optional_window),
        ),
        TargetFamily(
            name="qwen3_moe",
            describes="Qwen3 mixture of experts",
            architecture="Qwen3MoeForCausalLM",
            since=(4, 51),
            max_position_embeddings=32768,
            needed=("num_key_value_heads", "moe_intermediate_size", "num_experts", "num_experts_per_tok"),
            understood=dialects.qwen3_moe,
            own_keys=(
                "moe_intermediate_size", "num_experts", "num_experts_per_tok", "norm_topk_prob", "decoder_sparse_step",
                "mlp_only_layers",
            ),
            refusals=(*EVERY, optional_window),
            in_files=dialects.qwen3_moe_files,
        ),
        TargetFamily(
            name="mistral",
            describes="Mistral",
            architecture="MistralForCausalLM",
            since=(4, 53),
            max_position_embeddings=131072,
            needed=("num_key_value_heads",),
            understood=dialects.mistral,
            refusals=(*EVERY, odd_window),
            own_keys=("sliding_window",),
            window="sliding_window",
            plain=True,
        ),
        TargetFamily(
            name="mixtral",
            describes="Mixtral",
            architecture="MixtralForCausalLM",
            since=(4, 53),
            max_position_embeddings=131072,
            rope_theta=1e6,
            rms_norm_eps=1e-5,
            needed=("num_key_value_heads", "num_local_experts", "num_experts_per_tok"),
            own_keys=("sliding_window", "num_local_experts", "num_experts_per_tok"),
            refusals=(*EVERY, odd_window),
            window="sliding_window",
            serves={"eagle": "auto", "eagle3": "transformers"},
            first_aux_layer=1,
            in_files=dialects.mixtral_files,
        ),
        TargetFamily(
            name="phi3",
            describes="Phi-3 / Phi-4",
            architecture="Phi3ForCausalLM",
            since=(4, 53),
            max_position_embeddings=4096,
            rms_norm_eps=1e-5,
            understood=dialects.phi3,
            own_keys=("sliding_window", "partial_rotary_factor"),
            # Its rope may be partial, and it may bring the code that transformers took over.
            refusals=(other_code_than_phi3s, unknown_rope, weights_elsewhere, odd_window),
            window="sliding_window",
        ),
        TargetFamily(
            name="gemma3_text",
            describes="Gemma 3 (text)",
            architecture="Gemma3ForCausalLM",
            since=(5, 0),  # 4.57.1's AutoModel finds none of its weights
            max_position_embeddings=131072,
            rope_theta=1e6,
            tied=True,
            needed=("head_dim", "num_key_value_heads", "sliding_window"),
            understood=dialects.gemma3,
            own_keys=(
                "sliding_window", "layer_types", "query_pre_attn_scalar", "rope_local_base_freq", "hidden_activation",
            ),
            refusals=(*EVERY, odd_window, soft_cap, both_directions),
            serves={"eagle": "auto", "eagle3": "transformers"},
            first_aux_layer=1,
            scales_embeddings=True,
            norm_offset=1.0,
        ),
        TargetFamily(
            name="granite",
            describes="Granite",
            architecture="GraniteForCausalLM",
            max_position_embeddings=2048,
            own_keys=("embedding_multiplier", "residual_multiplier", "attention_multiplier", "logits_scaling"),
            divisor="logits_scaling",
            refusals=(*EVERY, unread_window),
        ),
        TargetFamily(
            name="smollm3",
            describes="SmolLM3",
            architecture="SmolLM3ForCausalLM",
            since=(4, 53),
            max_position_embeddings=32768,
            rope_theta=2e6,
            tied=True,
            needed=("num_key_value_heads",),
            understood=dialects.smollm3,
            own_keys=("no_rope_layers",),
            first_aux_layer=1,
            refusals=(*EVERY, optional_window),
        ),
    )
}  # fmt: skip
