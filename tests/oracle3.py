"""EAGLE-3's oracle pairs: a small target whose next token an EAGLE-3 draft can compute almost exactly.

The target's hidden dimensions are three groups: A (a constant and a part of the token), B (another part of the token)
and C (nothing, in the embedding). Of its seven layers two do anything:

    layer 1   attends to the token before and writes a map of that token's B into C: P[t+1]; and noise over its own B
    layer 6   a random layer that reads A and C

A draft row t reads the input of layer 1 at t, which is x[t]'s embedding, so ``fc`` can make P[t+1] of it: what layer 6
reads at t+1 in C; in A it reads x[t+1]'s embedding, which the draft is given as a token. So the layer is a copy of the
target's last one, with the columns of A in its first half and those of C in its second. Both halves of q, k and v, the
order and the choice of the layers, every norm and the reduced head decide the first draft token. Later steps of a chain
have no P to read: `tests/vllm/test_parity.py` is about them.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from pathlib import Path

import torch

from tests.oracle import FIRST_TOKEN, Shape, config_of, write_model
from tests.tiny import byte_level_tokenizer, word_piece_tokenizer

LAYERS, READ = 7, (1, 3, 5)
#: Dimensions of the groups A and B; C has the rest.
A, B = 32, 32
#: Root mean square of an embedding.
SCALE = 0.02
#: Of the tokens, how many the draft chooses among.
DRAFTED = 400


@dataclass(frozen=True, slots=True)
class Oracle:
    """target, draft: folders of the pair; the draft is in public names."""

    target: Path
    draft: Path


def write_oracle(folder: Path, shape: Shape) -> Oracle:
    """Write the target and its EAGLE-3 draft."""
    generator = torch.Generator().manual_seed(shape.seed)
    target, draft = _tensors(shape, generator)
    config = config_of(shape) | {"num_hidden_layers": LAYERS}
    write_model(folder / "target", config, target)
    tokenizer = byte_level_tokenizer() if shape.family == "qwen2" else word_piece_tokenizer()
    tokenizer.save_pretrained(folder / "target")
    keys = {
        "architectures": ["LlamaForCausalLMEagle3"],
        "model_type": "llama",
        "num_hidden_layers": 1,
        "tie_word_embeddings": False,
        "draft_vocab_size": DRAFTED,
        "eagle_aux_hidden_state_layer_ids": list(READ),
    }
    write_model(folder / "draft", config | keys, draft)
    return Oracle(folder / "target", folder / "draft")


def _tensors(shape: Shape, generator: torch.Generator) -> tuple[dict[str, torch.Tensor], dict[str, torch.Tensor]]:
    size, width = shape.hidden_size, shape.hidden_size // shape.heads
    c = A + B
    keys = shape.kv_heads * width

    def normal(rows: int, columns: int, gain: float) -> torch.Tensor:
        return torch.randn(rows, columns, generator=generator) * gain / columns**0.5

    def weights() -> torch.Tensor:  # of a norm, none of them nearly one
        return torch.exp(0.8 * torch.randn(size, generator=generator))

    embedding = torch.zeros(shape.vocab_size, size)
    embedding[:, 0] = 3.0  # the constant
    embedding[:, 1:c] = torch.randn(shape.vocab_size, c - 1, generator=generator)
    for group in (slice(1, A), slice(A, c)):  # all tokens are alike in size, in A and in B
        part = embedding[:, group]
        embedding[:, group] = part / part.norm(dim=-1, keepdim=True) * part.shape[1] ** 0.5
    embedding *= SCALE / embedding[0].pow(2).mean().sqrt()
    normed = 1 / embedding[0].pow(2).mean().sqrt()  # what a norm multiplies an embedding by
    embedding[FIRST_TOKEN] = 0
    into_c = torch.linalg.qr(torch.randn(size - c, B, generator=generator))[0] * 8.0

    target = {"model.embed_tokens.weight": embedding, "model.norm.weight": weights()}
    for number in range(LAYERS):
        layer = {
            "self_attn.q_proj.weight": torch.zeros(size, size),
            "self_attn.k_proj.weight": torch.zeros(keys, size),
            "self_attn.v_proj.weight": torch.zeros(keys, size),
            "self_attn.o_proj.weight": torch.zeros(size, size),
            "mlp.gate_proj.weight": normal(2 * size, size, 1.0),
            "mlp.up_proj.weight": normal(2 * size, size, 1.0),
            "mlp.down_proj.weight": torch.zeros(size, 2 * size),
            "input_layernorm.weight": torch.ones(size),
            "post_attention_layernorm.weight": torch.ones(size),
        }
        if shape.family == "qwen2":
            layer |= {
                f"self_attn.{name}_proj.bias": torch.zeros(len(layer[f"self_attn.{name}_proj.weight"]))
                for name in "qkv"
            }
        if number == 1:
            _attend_to_the_token_before(layer, width, float(embedding[1, 0] * normed), shape.rope_theta)
            layer["self_attn.v_proj.weight"][:B, A:c] = torch.eye(B)
            layer["self_attn.o_proj.weight"][c:, :B] = into_c
            layer["self_attn.o_proj.weight"][A:c, :B] = normal(B, B, 0.02)
        if number == LAYERS - 1:
            layer |= {
                "self_attn.q_proj.weight": normal(size, size, 2.0),
                "self_attn.k_proj.weight": normal(keys, size, 2.0),
                "self_attn.v_proj.weight": normal(keys, size, 2.0),
                "self_attn.o_proj.weight": normal(size, size, 4.0),
                "mlp.gate_proj.weight": normal(2 * size, size, 2.0),
                "mlp.up_proj.weight": normal(2 * size, size, 2.0),
                "mlp.down_proj.weight": normal(size, 2 * size, 2.0),
                "input_layernorm.weight": weights(),
                "post_attention_layernorm.weight": weights(),
            }
            for name in ("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj"):
                layer[f"{name}.weight"][:, A:c] = 0
                layer[f"{name}.weight"][:, 1:A] *= 240  # beside C the token is small
                layer[f"{name}.weight"][:, 0] = 0
            last = layer
        target |= {f"model.layers.{number}.{name}": tensor for name, tensor in layer.items()}
    head = torch.randn(shape.vocab_size, size, generator=generator) * 0.1
    head[:, :c] = 0
    target["lm_head.weight"] = head

    # The stream that layer 6 reads at t+1: e[t+1] in A and B, with noise in B, P[t+1] in C. Its norm divides by r.
    p = into_c @ (embedding[1, A:c] * normed)
    r = ((embedding[1].pow(2).sum() + p.pow(2).sum()) / size).sqrt()
    of_p = (p.pow(2).sum() / size).sqrt()  # hidden_norm divides by this, input_layernorm by the embedding's size
    scale = last["input_layernorm.weight"]
    input_norm, hidden_norm = weights(), weights()
    draft = {f"midlayer.{name}": tensor.clone() for name, tensor in last.items() if "bias" not in name}
    for name in ("q_proj", "k_proj", "v_proj"):
        weight = last[f"self_attn.{name}.weight"] * scale
        own, past = torch.zeros(2, *weight.shape)
        own[:, :A] = weight[:, :A] / (normed * r) / input_norm[:A]
        past[:, c:] = weight[:, c:] * (of_p / r) / hidden_norm[c:]
        draft[f"midlayer.self_attn.{name}.weight"] = torch.cat([own, past], dim=1)
    fc = torch.zeros(size, len(READ) * size)
    fc[c:, A:c] = into_c * normed
    ids = torch.randperm(shape.vocab_size, generator=generator)[:DRAFTED].sort().values
    draft |= {
        "fc.weight": fc,
        "midlayer.input_layernorm.weight": input_norm,
        "midlayer.hidden_norm.weight": hidden_norm,
        "norm.weight": target["model.norm.weight"].clone(),
        "lm_head.weight": head[ids],
        "d2t": ids - torch.arange(DRAFTED),
    }
    # The target says drafted tokens alone, so that a wrong table is not hidden among misses.
    outside = torch.ones(shape.vocab_size, dtype=torch.bool)
    outside[ids] = False
    head[outside] = 0
    return target, draft


def _attend_to_the_token_before(layer: dict[str, torch.Tensor], width: int, constant: float, theta: float) -> None:
    """The first head's queries and keys: of the constant alone, the query turned back by one position."""
    gain = 40.0**0.5 * width**0.25 / constant
    for pair in range(6):
        angle = theta ** (-2 * pair / width)
        layer["self_attn.k_proj.weight"][pair, 0] = gain
        layer["self_attn.q_proj.weight"][pair, 0] = gain * math.cos(angle)
        layer["self_attn.q_proj.weight"][pair + width // 2, 0] = -gain * math.sin(angle)
