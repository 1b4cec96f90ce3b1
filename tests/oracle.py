"""Oracle pairs: a small target and a draft whose right answer is known, because the draft *is* the target's last layer.

The target's layers before the last add nothing (zero ``o_proj`` and ``down_proj``) and its embeddings have RMS 1, so
that the last layer's input norm changes nothing either. Its last layer behind ``fc = [I | 0]`` is then an almost exact
draft: exported rightly it is accepted nearly always, and a lost bias, a wrong theta or an exchanged half of ``fc``
shows at once. (Almost: the draft never sees the first token, so every prompt begins with one that says little.)

The last layer is made so that everything it is tested for decides the next token: attention is sharp, its output is
large beside the residual, and q, k, v biases where the family has them are large too.
"""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path

import torch
from safetensors.torch import save_file

from tests.tiny import VOCAB, byte_level_tokenizer, word_piece_tokenizer

#: Its embedding is zero.
FIRST_TOKEN = 0


@dataclass(frozen=True, slots=True)
class Shape:
    """What tells the oracle targets apart. kv_heads: 4 is as many as there are heads."""

    family: str = "llama"
    kv_heads: int = 4
    tied: bool = False
    rope_theta: float = 10000.0
    hidden_size: int = 128
    heads: int = 4
    layers: int = 2
    vocab_size: int = 512
    seed: int = 0


def config_of(shape: Shape) -> dict:
    """The target's ``config.json``."""
    return {
        "architectures": [{"llama": "LlamaForCausalLM", "qwen2": "Qwen2ForCausalLM"}[shape.family]],
        "model_type": shape.family,
        "hidden_size": shape.hidden_size,
        "intermediate_size": 2 * shape.hidden_size,
        "num_hidden_layers": shape.layers,
        "num_attention_heads": shape.heads,
        "num_key_value_heads": shape.kv_heads,
        "vocab_size": shape.vocab_size,
        "max_position_embeddings": 1024,
        "rms_norm_eps": 1e-6,
        "rope_theta": shape.rope_theta,
        "hidden_act": "silu",
        "tie_word_embeddings": shape.tied,
        "bos_token_id": None,
        "eos_token_id": 2,
        "torch_dtype": "float32",
    }


def layer_tensors(shape: Shape, generator: torch.Generator) -> dict[str, torch.Tensor]:
    """The last layer under bare names (``self_attn.q_proj.weight``, ...), without its input norm."""
    size, head_dim = shape.hidden_size, shape.hidden_size // shape.heads

    def normal(rows: int, columns: int, gain: float) -> torch.Tensor:
        return torch.randn(rows, columns, generator=generator) * gain / columns**0.5

    keys = shape.kv_heads * head_dim
    tensors = {
        "self_attn.q_proj.weight": normal(size, size, 2.0),
        "self_attn.k_proj.weight": normal(keys, size, 2.0),
        "self_attn.v_proj.weight": normal(keys, size, 2.0),
        "self_attn.o_proj.weight": normal(size, size, 4.0),
        "mlp.gate_proj.weight": normal(2 * size, size, 2.0),
        "mlp.up_proj.weight": normal(2 * size, size, 2.0),
        "mlp.down_proj.weight": normal(size, 2 * size, 2.0),
        "post_attention_layernorm.weight": torch.ones(size),
    }
    if shape.family == "qwen2":
        for name, rows in (("q", size), ("k", keys), ("v", keys)):
            tensors[f"self_attn.{name}_proj.bias"] = torch.randn(rows, generator=generator) * 2.0
    return tensors


def target_tensors(shape: Shape) -> dict[str, torch.Tensor]:
    """The whole target under Hugging Face names, float32."""
    generator = torch.Generator().manual_seed(shape.seed)
    embedding = torch.randn(shape.vocab_size, shape.hidden_size, generator=generator)
    embedding /= embedding.pow(2).mean(-1, keepdim=True).sqrt()
    embedding[FIRST_TOKEN] = 0
    tensors = {"model.embed_tokens.weight": embedding, "model.norm.weight": torch.ones(shape.hidden_size)}
    for index in range(shape.layers):
        layer = layer_tensors(shape, generator) | {"input_layernorm.weight": torch.ones(shape.hidden_size)}
        if index < shape.layers - 1:
            layer["self_attn.o_proj.weight"].zero_()
            layer["mlp.down_proj.weight"].zero_()
        tensors |= {f"model.layers.{index}.{name}": tensor for name, tensor in layer.items()}
    if not shape.tied:
        tensors["lm_head.weight"] = torch.randn(shape.vocab_size, shape.hidden_size, generator=generator) * 0.1
    return tensors


def draft_tensors(shape: Shape, target: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """The oracle draft under the public EAGLE names: the target's last layer behind ``fc = [I | 0]``."""
    prefix = f"model.layers.{shape.layers - 1}."
    tensors = {
        "layers.0." + name.removeprefix(prefix): tensor.clone()
        for name, tensor in target.items()
        if name.startswith(prefix) and "input_layernorm" not in name
    }
    tensors["fc.weight"] = torch.eye(shape.hidden_size, 2 * shape.hidden_size)
    return tensors | {"embed_tokens.weight": target["model.embed_tokens.weight"].clone()}


def write_model(folder: Path, config: dict, tensors: dict[str, torch.Tensor]) -> None:
    folder.mkdir(parents=True)
    (folder / "config.json").write_text(json.dumps(config, indent=2), encoding="utf-8")
    contiguous = {name: tensor.contiguous() for name, tensor in tensors.items()}
    save_file(contiguous, folder / "model.safetensors", metadata={"format": "pt"})  # older transformers insist on it


def write_pair(folder: Path, shape: Shape) -> tuple[Path, Path]:
    """Write the target and the oracle draft (public EAGLE layout); returns their folders."""
    target, draft = folder / "target", folder / "draft"
    tensors = target_tensors(shape)
    write_model(target, config_of(shape), tensors)
    tokenizer = byte_level_tokenizer() if shape.family == "qwen2" else word_piece_tokenizer()
    tokenizer.save_pretrained(target)
    write_model(draft, config_of(shape) | {"num_hidden_layers": 1}, draft_tensors(shape, tensors))
    return target, draft


def random_prompts(count: int = 8, length: int = 128, seed: int = 1) -> list[list[int]]:
    """Token ids of prompts: random tokens."""
    generator = torch.Generator().manual_seed(seed)
    ids = torch.randint(3, VOCAB, (count, length), generator=generator)
    ids[:, 0] = FIRST_TOKEN
    return ids.tolist()
