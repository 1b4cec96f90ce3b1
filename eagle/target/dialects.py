"""What families say in words of their own: their config.json in Llama's words, their tensors as the files name them."""

from __future__ import annotations

import re
from typing import Any

Raw = dict[str, Any]
#: Of tensors, by name.
Shapes = dict[str, tuple[int, ...]]


def qwen3_moe(raw: Raw) -> Raw:
    """transformers 5 may call the number of experts as Mixtral does."""
    experts = raw.get("num_experts") or raw.get("num_local_experts")
    return raw | ({"num_experts": experts} if experts else {})


def mistral(raw: Raw) -> Raw:
    """Where the key is absent there is a window; an explicit null is none."""
    return {"sliding_window": 4096} | raw


def phi3(raw: Raw) -> Raw:
    """Its rope's parts stand at the top in transformers 4, and two of its names mean longrope."""
    raw = dict(raw)
    for key in ("rope_parameters", "rope_scaling"):
        if not isinstance(raw.get(key), dict):
            continue
        rope = dict(raw[key])
        kind = rope.pop("type", None)
        kind = rope.get("rope_type") or kind or "default"
        rope["rope_type"] = "longrope" if kind in ("su", "yarn") else kind
        if (part := rope.pop("partial_rotary_factor", None)) is not None:
            raw["partial_rotary_factor"] = part
        raw[key] = rope
    if raw.get("partial_rotary_factor") == 1.0:
        del raw["partial_rotary_factor"]
    return raw


def gemma3(raw: Raw) -> Raw:
    """Two ropes, one for each kind of layer; the draft has that of the layers that attend to everything."""
    raw = dict(raw)
    raw["hidden_activation"] = raw["hidden_act"] = raw.get("hidden_activation") or "gelu_pytorch_tanh"
    rope = raw.get("rope_parameters") or {}
    if isinstance(rope, dict) and ("full_attention" in rope or "sliding_attention" in rope):
        local = (rope.get("sliding_attention") or {}).get("rope_theta")
        raw |= {"rope_parameters": rope.get("full_attention")} | ({"rope_local_base_freq": local} if local else {})
    raw.setdefault("rope_local_base_freq", 10000.0)
    pattern, layers = raw.get("sliding_window_pattern") or 6, raw.get("num_hidden_layers")
    if not raw.get("layer_types") and isinstance(layers, int):
        kinds = ("full_attention", "sliding_attention")
        raw["layer_types"] = [kinds[bool((number + 1) % pattern)] for number in range(layers)]
    return raw


def smollm3(raw: Raw) -> Raw:
    """Which layers have a rope, said by a list or by an interval."""
    layers, interval = raw.get("num_hidden_layers"), raw.get("no_rope_layer_interval") or 4
    if raw.get("no_rope_layers") or not isinstance(layers, int):
        return raw
    return raw | {"no_rope_layers": [int((number + 1) % interval != 0) for number in range(layers)]}


def qwen3_moe_files(shapes: Shapes) -> Shapes:
    return _experts_apart(shapes, ("gate_proj", "up_proj"), "down_proj")


def mixtral_files(shapes: Shapes) -> Shapes:
    apart = _experts_apart(shapes, ("w1", "w3"), "w2")
    return {re.sub(r"(layers\.\d+)\.mlp\.", r"\1.block_sparse_moe.", name): shape for name, shape in apart.items()}


def _experts_apart(shapes: Shapes, halves: tuple[str, str], down: str) -> Shapes:
    """transformers 5 holds the experts of a layer in two tensors ``[E, 2 * I, H]`` and ``[E, H, I]``; files hold three
    matrices an expert, and are read and written so.
    """
    found: Shapes = {}
    for name, shape in shapes.items():
        head, _, last = name.rpartition(".experts.")
        for expert in range(shape[0]) if head and last in ("gate_up_proj", "down_proj") else ():
            rows, columns = shape[1:]
            parts = {down: (rows, columns)} if last == "down_proj" else dict.fromkeys(halves, (rows // 2, columns))
            found |= {f"{head}.experts.{expert}.{part}.weight": size for part, size in parts.items()}
        if not (head and last in ("gate_up_proj", "down_proj")):
            found[name] = shape
    return found
