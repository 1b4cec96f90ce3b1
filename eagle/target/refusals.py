"""What a config.json says that makes a target unusable: why, and the cure."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

#: Of a raw config: why the target cannot be used; None where all is well.
Refusal = Callable[[dict[str, Any]], "str | None"]

#: The rope types that every supported transformers computes, and the keys each has to bring along.
ROPE_TYPES: dict[str, tuple[str, ...]] = {
    "default": (),
    "linear": ("factor",),
    "dynamic": ("factor",),
    "yarn": ("factor",),
    "longrope": ("short_factor", "long_factor"),
    "llama3": ("factor", "low_freq_factor", "high_freq_factor", "original_max_position_embeddings"),
}
#: Model types that people bring and that are none of the families, and why.
_NOT_SERVED = {
    "gemma2": "vLLM's EAGLE-1 draft does not load beside a Gemma 2 target (0.32: it has no lm_head to share). The text "
    "models of Gemma 3 are supported.",
}


def other_kind_of_model(raw: dict[str, Any]) -> str | None:
    """Why a model of no known family is not one; None where there is nothing particular to say."""
    kind, classes = raw.get("model_type"), " ".join(map(str, raw.get("architectures") or ()))
    if any(raw.get(f"{part}_config") for part in ("vision", "audio", "speech")):
        return (
            f"a model of text and images or sound ({classes or kind}). Drafts are trained here for text models, and "
            "vLLM's draft takes no images: name the text model that it was built on, or save its language model as a "
            "text model of its own."
        )
    if raw.get("is_encoder_decoder") or "ForMaskedLM" in classes:
        return f"an encoder ({classes or kind}), and no model that continues a text. Name a decoder, a chat model."
    if kind in _NOT_SERVED:
        return _NOT_SERVED[kind]
    return own_code(raw)


def own_code(raw: dict[str, Any]) -> str | None:
    found = raw.get("auto_map")
    if not found:
        return None
    named = ", ".join(map(str, found.values())) if isinstance(found, dict) else str(found)
    return (
        f"the model brings code of its own (auto_map: {named}), which is not run here. Use a conversion of it to a "
        "supported model, Llama mostly; where it is one already, and the code only repeats what transformers has, take "
        "auto_map out of config.json."
    )


def other_code_than_phi3s(raw: dict[str, Any]) -> str | None:
    """The released Phi-3 models bring the code that transformers took over; it is not run."""
    found = raw.get("auto_map")
    theirs = {"AutoConfig": "configuration_phi3.Phi3Config", "AutoModelForCausalLM": "modeling_phi3.Phi3ForCausalLM"}
    # transformers writes the repository in front of the name when it saves a model again.
    bare = {key: str(value).rpartition("--")[2] for key, value in found.items()} if isinstance(found, dict) else {}
    if bare and {key: bare.get(key, value) for key, value in theirs.items()} == theirs:
        return None
    return own_code(raw)


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


def partial_rope(raw: dict[str, Any]) -> str | None:
    # transformers' class of these models turns whole heads, vLLM's as much of one as the key says.
    ropes = (raw, raw.get("rope_parameters") or {}, raw.get("rope_scaling") or {})
    found = next((part for rope in ropes if (part := rope.get("partial_rotary_factor")) is not None), None)
    if found is None or found == 1:
        return None
    return (
        f"partial_rotary_factor is {found!r}, which transformers does not heed for these models and vLLM does. Take "
        "the key out of config.json where the model was trained with a rope over whole heads."
    )


def unsteady_rope(rope: dict[str, Any] | None, positions: int, longest: int) -> str | None:
    """Why features of records of up to `longest` tokens would be no property of a record. rope: scaling, as read.
    positions: the model's.
    """
    if (rope or {}).get("rope_type") != "dynamic" or longest <= positions:
        return None
    return (
        f"the base model has {positions} positions and a rope of type 'dynamic', whose angles past them are by the "
        "longest record of a batch in transformers, and not in vLLM's table. Features of a record would depend on its "
        "neighbours."
    )


def weights_elsewhere(raw: dict[str, Any]) -> str | None:
    found = raw.get("transformers_weights")
    if not found:
        return None
    return (
        f"transformers_weights names {found} as the weights, which only some versions of transformers follow. Name the "
        "file model.safetensors (or model.safetensors.index.json) and take the key out of config.json."
    )


def optional_window(raw: dict[str, Any]) -> str | None:
    # transformers takes a window of 4096 where the key is absent; an explicit null is no window.
    if not (raw.get("use_sliding_window") and raw.get("sliding_window", 4096)):
        return None
    return (
        "use_sliding_window is on, which was never compared with vLLM for this kind of model. Set it to false (the "
        "released configs have it off)."
    )


def odd_window(raw: dict[str, Any]) -> str | None:
    # vLLM takes 0 for no window, transformers for one in which nothing is seen.
    found = raw.get("sliding_window")
    if found is None or (type(found) is int and found > 0):
        return None
    return f"sliding_window is {found!r}; expected a number of tokens, or null where there is no window."


def unread_window(raw: dict[str, Any]) -> str | None:
    # The key is Mistral's; transformers' class of these models has no window, and vLLM's takes it from the key,
    # whatever Qwen's switch says beside it. A draft, of a single layer, has the window of its target there.
    found = raw.get("sliding_window")
    switched_off = raw.get("use_sliding_window") is False and raw.get("num_hidden_layers") == 1
    if not found or switched_off or found >= raw.get("max_position_embeddings", 0):
        return None
    return (
        f"sliding_window is {found!r}, which transformers does not heed for these models and vLLM does. Take the key "
        "out of config.json where the model was trained without a window."
    )


def soft_cap(raw: dict[str, Any]) -> str | None:
    capped = [key for key in ("final_logit_softcapping", "attn_logit_softcapping") if raw.get(key)]
    if not capped:
        return None
    return (
        f"{' and '.join(capped)} is set: soft-capped logits are not what vLLM's draft computes. The released models of "
        "Gemma 3 have none; name one of these."
    )


def both_directions(raw: dict[str, Any]) -> str | None:
    if not raw.get("use_bidirectional_attention"):
        return None
    return "use_bidirectional_attention is on: an encoder, and no model that continues a text. Name a chat model."


EVERY: tuple[Refusal, ...] = (own_code, unknown_rope, partial_rope, weights_elsewhere)
