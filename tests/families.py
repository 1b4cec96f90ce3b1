"""A tiny random target of every shape that people serve: what `tests/vllm` proves, and what docs/targets.md lists.

A row is a shape, not a model: one ``model_type`` may have several. They are made with transformers' own classes and
saved as it saves them. Everything that sets a shape apart is large enough to matter within the tests' few tokens: norms
are not nearly one, biases not nearly zero, windows shorter than the prompts.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
import transformers

from eagle.target.families import TARGET_FAMILIES
from eagle.versions import release
from tests.tiny import VOCAB, byte_level_tokenizer

#: EAGLE-3 reads three layers, by default 2, 4 and 5 of so many.
LAYERS = 8
HIDDEN, HEADS = 128, 4
#: Tokens that a layer with a sliding window sees; every prompt of these tests is longer.
WINDOW = 24
#: The original context of the shapes with longrope; every prompt is shorter.
ORIGINAL = 512

_LLAMA3_ROPE = {
    "rope_type": "llama3",
    "rope_theta": 500_000.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 64,
}


@dataclass(frozen=True, slots=True)
class Row:
    """One shape.

    name: short. family: its ``model_type``. classes: what transformers' config and model classes begin with. models:
    released models of the shape. shape: what it is, by language. options: of the config, beside the sizes. window: what
    its attention is limited to in all layers, and so the served draft's. gate: whether the gate runs it.
    """

    name: str
    family: str
    classes: str
    models: str
    shape: Mapping[str, str]
    options: Mapping[str, Any] = field(default_factory=dict)
    window: int | None = None
    gate: bool = False

    def is_known_here(self) -> bool:
        """Whether the installed transformers computes it as it is served."""
        return release(transformers.__version__) >= TARGET_FAMILIES[self.family].since


ROWS: tuple[Row, ...] = (
    Row(
        "llama",
        "llama",
        "Llama",
        "Llama 1, 2 and 3, Vicuna",
        {"en": "plain rope", "zh": "普通 RoPE"},
        {"rope_parameters": {"rope_type": "default", "rope_theta": 500_000.0}},
    ),
    Row(
        "llama-3.1",
        "llama",
        "Llama",
        "Llama 3.1 and 3.3, DeepSeek-R1-Distill-Llama",
        {"en": "llama3 rope", "zh": "llama3 RoPE"},
        {"rope_parameters": _LLAMA3_ROPE | {"factor": 8.0}},
        gate=True,
    ),
    Row(
        "llama-3.2",
        "llama",
        "Llama",
        "Llama 3.2 (text)",
        {"en": "llama3 rope, tied embeddings", "zh": "llama3 RoPE，词嵌入共享"},
        {"rope_parameters": _LLAMA3_ROPE | {"factor": 32.0}, "tie_word_embeddings": True},
    ),
    Row(
        "qwen2",
        "qwen2",
        "Qwen2",
        "Qwen2, Qwen2.5, DeepSeek-R1-Distill-Qwen",
        {"en": "biases of q, k and v", "zh": "q、k、v 有偏置"},
        {"rope_parameters": {"rope_type": "default", "rope_theta": 1e6}},
        gate=True,
    ),
    Row(
        "qwen3",
        "qwen3",
        "Qwen3",
        "Qwen3",
        {"en": "norms of q and k, head size not hidden / heads", "zh": "q、k 有归一化，head 大小不等于 hidden / heads"},
        {"head_dim": 64, "rope_parameters": {"rope_type": "default", "rope_theta": 1e6}},
        gate=True,
    ),
    Row(
        "qwen3_moe",
        "qwen3_moe",
        "Qwen3Moe",
        "Qwen3-30B-A3B, Qwen3-235B-A22B",
        {"en": "mixture of experts", "zh": "混合专家"},
        {
            "head_dim": 64,
            "num_experts": 4,
            "num_experts_per_tok": 2,
            "moe_intermediate_size": 96,
            "norm_topk_prob": True,
            "rope_parameters": {"rope_type": "default", "rope_theta": 1e6},
        },
        gate=True,
    ),
    Row(
        "mistral",
        "mistral",
        "Mistral",
        "Mistral 7B v0.2 and v0.3, Mistral NeMo, Mistral Small (text)",
        {"en": "no window, head size not hidden / heads", "zh": "无滑动窗口，head 大小不等于 hidden / heads"},
        {"sliding_window": None, "head_dim": 64, "rope_parameters": {"rope_type": "default", "rope_theta": 1e6}},
    ),
    Row(
        "mistral-window",
        "mistral",
        "Mistral",
        "Mistral 7B v0.1",
        {"en": "sliding window", "zh": "滑动窗口"},
        {"sliding_window": WINDOW, "rope_parameters": {"rope_type": "default", "rope_theta": 10_000.0}},
        window=WINDOW,
        gate=True,
    ),
    Row(
        "mixtral",
        "mixtral",
        "Mixtral",
        "Mixtral 8x7B, 8x22B",
        {"en": "mixture of experts", "zh": "混合专家"},
        {
            "num_local_experts": 4,
            "num_experts_per_tok": 2,
            "rope_parameters": {"rope_type": "default", "rope_theta": 1e6},
        },
    ),
    Row(
        "phi3",
        "phi3",
        "Phi3",
        "Phi-3-mini-4k, Phi-3-medium-4k",
        {"en": "fused projections, sliding window", "zh": "合并的投影，滑动窗口"},
        {"sliding_window": WINDOW, "num_key_value_heads": HEADS},
        window=WINDOW,
        gate=True,
    ),
    Row(
        "phi4",
        "phi3",
        "Phi3",
        "Phi-4",
        {"en": "fused projections", "zh": "合并的投影"},
        {"rope_parameters": {"rope_type": "default", "rope_theta": 250_000.0}},
    ),
    Row(
        "phi3-longrope",
        "phi3",
        "Phi3",
        "Phi-3-mini-128k, Phi-3.5-mini",
        {"en": "fused projections, longrope", "zh": "合并的投影，longrope"},
        {
            "original_max_position_embeddings": ORIGINAL,
            "rope_parameters": {
                "rope_type": "longrope",
                "rope_theta": 10_000.0,
                "short_factor": [1.0 + 0.05 * at for at in range(16)],
                "long_factor": [1.0 + 2.0 * at for at in range(16)],
            },
        },
    ),
    Row(
        "phi4-mini",
        "phi3",
        "Phi3",
        "Phi-4-mini",
        {
            "en": "fused projections, longrope over a part of each head, tied embeddings",
            "zh": "合并的投影，部分维度的 longrope，词嵌入共享",
        },
        {
            "tie_word_embeddings": True,
            "original_max_position_embeddings": ORIGINAL,
            "partial_rotary_factor": 0.75,
            "rope_parameters": {
                "rope_type": "longrope",
                "rope_theta": 10_000.0,
                "partial_rotary_factor": 0.75,
                "short_factor": [1.0 + 0.05 * at for at in range(12)],
                "long_factor": [1.0 + 2.0 * at for at in range(12)],
            },
        },
    ),
    Row(
        "gemma3_text",
        "gemma3_text",
        "Gemma3",
        "Gemma 3 270M and 1B",
        {
            "en": "layers with and without a window, a theta of each, scaled and tied embeddings",
            "zh": "部分层有滑动窗口，theta 各不相同，词嵌入经缩放且共享",
        },
        {
            "head_dim": 64,
            "query_pre_attn_scalar": 40,
            "sliding_window": WINDOW,
            "sliding_window_pattern": 4,
            "tie_word_embeddings": True,
            "rope_parameters": {
                "sliding_attention": {"rope_type": "default", "rope_theta": 10_000.0},
                "full_attention": {"rope_type": "default", "rope_theta": 1e6},
            },
        },
        gate=True,
    ),
    Row(
        "granite",
        "granite",
        "Granite",
        "Granite 3.0 to 3.3 (dense)",
        {
            "en": "multipliers of embedding, attention, residual and logits",
            "zh": "嵌入、注意力、残差和 logits 各有乘数",
        },
        {
            "tie_word_embeddings": True,
            "embedding_multiplier": 3.0,
            "attention_multiplier": 0.1,
            "residual_multiplier": 0.4,
            "logits_scaling": 4.0,
            "rope_parameters": {"rope_type": "default", "rope_theta": 1e6},
        },
    ),
    Row(
        "smollm3",
        "smollm3",
        "SmolLM3",
        "SmolLM3",
        {"en": "every fourth layer without rope, tied embeddings", "zh": "每四层有一层没有 RoPE，词嵌入共享"},
        {
            "no_rope_layer_interval": 4,
            "tie_word_embeddings": True,
            "rope_parameters": {"rope_type": "default", "rope_theta": 2e6},
        },
    ),
)


def row_named(name: str) -> Row:
    return next(row for row in ROWS if row.name == name)


def make_row(folder: Path, row: Row, seed: int = 0, **options: Any) -> Path:
    """The row's target in float32 with a tokenizer, as a Hugging Face folder. options: of its config, on top."""
    torch.manual_seed(seed)
    config_class = getattr(transformers, f"{row.classes}TextConfig", None) or getattr(
        transformers, f"{row.classes}Config"
    )
    model = getattr(transformers, f"{row.classes}ForCausalLM")(config_class(**_options(row) | options))
    offset = 0.0 if row.classes != "Gemma3" else 1.0  # Gemma multiplies by one more than the weight
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "norm" in name:
                parameter.uniform_(0.5 - offset, 1.5 - offset)
            elif name.endswith(".bias"):
                parameter.normal_(std=0.2)
    model.save_pretrained(folder)
    byte_level_tokenizer().save_pretrained(folder)
    return folder


def _options(row: Row) -> dict[str, Any]:
    options: dict[str, Any] = {
        "vocab_size": VOCAB + 24,
        "hidden_size": HIDDEN,
        "intermediate_size": HIDDEN * 3 // 2,
        "num_hidden_layers": LAYERS,
        "num_attention_heads": HEADS,
        "num_key_value_heads": HEADS // 2,
        "max_position_embeddings": 4096,
        "tie_word_embeddings": False,
        "initializer_range": 0.2,  # large enough that the random model's choices are not all alike
        "bos_token_id": None,
        "eos_token_id": 2,
        "pad_token_id": 0,
        "torch_dtype": "float32",
    } | dict(row.options)
    if "rope_parameters" in options:  # transformers writes into what it is given
        options["rope_parameters"] = {
            key: dict(value) if isinstance(value, dict) else value for key, value in options["rope_parameters"].items()
        }
        if int(transformers.__version__.split(".")[0]) < 5:
            options |= _before_5(options.pop("rope_parameters"))
    return options


def _before_5(rope: dict[str, Any]) -> dict[str, Any]:
    """The rope as transformers 4 is told of it."""
    if "full_attention" in rope:
        local, everywhere = rope["sliding_attention"], rope["full_attention"]
        return {"rope_theta": everywhere["rope_theta"], "rope_local_base_freq": local["rope_theta"]}
    theta, kind = rope.pop("rope_theta"), rope["rope_type"]
    rope.pop("partial_rotary_factor", None)
    return {"rope_theta": theta, "rope_scaling": None if kind == "default" else rope}
