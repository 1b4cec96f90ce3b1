"""The draft head: one class for training, decoding and export, and the folder it is saved as.

    f̂[t+1] = layer(fc(concat(embed(x[t+1]), f[t])))       the layer has no input norm, nothing follows it

Weights carry the public EAGLE names (``fc.weight``, ``layers.0.self_attn.q_proj.weight``, ...). The embedding is
the target's and frozen; ``fc`` has no bias, because vLLM has none to load it into.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import nn
from torch.nn import functional

from eagle.cli import RequestError, write_json
from eagle.model_config import ModelConfig, load_config
from eagle.target import Weights
from eagle.tensor_file import write_tensors

WEIGHTS_FILE = "model.safetensors"

#: Takes the keys and values of new rows, keeps them, and gives those of all rows so far: a KV cache's one verb.
Remember = Callable[[torch.Tensor, torch.Tensor], tuple[torch.Tensor, torch.Tensor]]


class Attention(nn.Module):
    """Grouped-query self-attention in the public key names."""

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        self.heads, self.kv_heads, self.head_dim = (
            config.num_attention_heads,
            config.num_key_value_heads,
            config.head_dim,
        )
        size, bias = config.hidden_size, config.qkv_bias
        self.q_proj = nn.Linear(size, self.heads * self.head_dim, bias=bias)
        self.k_proj = nn.Linear(size, self.kv_heads * self.head_dim, bias=bias)
        self.v_proj = nn.Linear(size, self.kv_heads * self.head_dim, bias=bias)
        self.o_proj = nn.Linear(self.heads * self.head_dim, size, bias=config.o_bias)

    def project(
        self, hidden: torch.Tensor, rotary: tuple[torch.Tensor, torch.Tensor]
    ) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """Queries ``[B, heads, T, head_dim]``, keys and values ``[B, kv_heads, T, head_dim]``, rotated."""
        batch, length, _ = hidden.shape

        def split(projected: torch.Tensor, heads: int) -> torch.Tensor:
            return projected.view(batch, length, heads, self.head_dim).transpose(1, 2)

        queries, keys = split(self.q_proj(hidden), self.heads), split(self.k_proj(hidden), self.kv_heads)
        return rotate(queries, rotary), rotate(keys, rotary), split(self.v_proj(hidden), self.kv_heads)

    def attend(
        self, queries: torch.Tensor, keys: torch.Tensor, values: torch.Tensor, mask: torch.Tensor | None
    ) -> torch.Tensor:
        """Attention output ``[B, T, H]``. mask: None for causal, else True (or 0) where a query may look."""
        groups = self.heads // self.kv_heads
        if groups > 1:  # torch before 2.5 knows no grouped queries
            keys, values = keys.repeat_interleave(groups, 1), values.repeat_interleave(groups, 1)
        mixed = functional.scaled_dot_product_attention(
            queries, keys, values, attn_mask=mask, is_causal=mask is None, scale=1 / math.sqrt(self.head_dim)
        )
        return self.o_proj(mixed.transpose(1, 2).flatten(2))


def rotate(states: torch.Tensor, rotary: tuple[torch.Tensor, torch.Tensor]) -> torch.Tensor:
    """Rotary position embedding of ``[B, heads, T, head_dim]`` by cos and sin ``[B, T, head_dim]``."""
    cos, sin = (part.unsqueeze(1).to(states.dtype) for part in rotary)
    first, second = states.chunk(2, dim=-1)
    return states * cos + torch.cat((-second, first), dim=-1) * sin


class MLP(nn.Module):
    """The gated feed-forward block in the public key names."""

    def __init__(self, config: ModelConfig) -> None:
        from transformers.activations import ACT2FN

        super().__init__()
        size, inner, bias = config.hidden_size, config.intermediate_size, config.mlp_bias
        self.gate_proj = nn.Linear(size, inner, bias=bias)
        self.up_proj = nn.Linear(size, inner, bias=bias)
        self.down_proj = nn.Linear(inner, size, bias=bias)
        self.act = ACT2FN[config.hidden_act]

    def forward(self, hidden: torch.Tensor) -> torch.Tensor:
        return self.down_proj(self.act(self.gate_proj(hidden)) * self.up_proj(hidden))


class RMSNorm(nn.Module):
    """Root-mean-square norm, computed in float32 as the targets do."""

    def __init__(self, size: int, eps: float) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(size))
        self.eps = eps

    def forward(self, hidden: torch.Tensor) -> torch.Tensor:
        wide = hidden.float()
        normed = wide * torch.rsqrt(wide.pow(2).mean(-1, keepdim=True) + self.eps)
        return self.weight * normed.to(hidden.dtype)


class DraftLayer(nn.Module):
    """A decoder layer of the target's shape without its input norm."""

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        self.self_attn = Attention(config)
        self.mlp = MLP(config)
        self.post_attention_layernorm = RMSNorm(config.hidden_size, config.rms_norm_eps)

    def forward(
        self,
        hidden: torch.Tensor,
        rotary: tuple[torch.Tensor, torch.Tensor],
        mask: torch.Tensor | None = None,
        remember: Remember | None = None,
    ) -> torch.Tensor:
        queries, keys, values = self.self_attn.project(hidden, rotary)
        if remember is not None:
            keys, values = remember(keys, values)
        hidden = hidden + self.self_attn.attend(queries, keys, values, mask)
        return hidden + self.mlp(self.post_attention_layernorm(hidden))


class DraftModel(nn.Module):
    """The EAGLE-1 draft of a Llama or Qwen2 target.

    embedding: the target's ``[V, H]``, kept frozen and in its own dtype. fc_bias: only for published drafts that
    carry one.
    """

    def __init__(self, config: ModelConfig, embedding: torch.Tensor, *, fc_bias: bool = False) -> None:
        super().__init__()
        self.config = config
        self.embed_tokens = nn.Embedding.from_pretrained(embedding, freeze=True)
        self.fc = nn.Linear(2 * config.hidden_size, config.hidden_size, bias=fc_bias)
        self.layers = nn.ModuleList([DraftLayer(config)])
        self.rotary = rotary_embedding(config)
        self._initialise()

    def _initialise(self) -> None:
        for module in self.modules():
            if isinstance(module, nn.Linear):
                nn.init.normal_(module.weight, std=self.config.initializer_range)
                if module.bias is not None:
                    nn.init.zeros_(module.bias)

    def inputs(self, tokens: torch.Tensor, features: torch.Tensor) -> torch.Tensor:
        """What ``fc`` reads: ``concat(embed(token), feature)`` ``[..., 2H]`` in the features' dtype."""
        return torch.cat((self.embed_tokens(tokens).to(features.dtype), features), dim=-1)

    def forward(
        self,
        tokens: torch.Tensor,
        features: torch.Tensor,
        positions: torch.Tensor | None = None,
        mask: torch.Tensor | None = None,
        remember: Remember | None = None,
    ) -> torch.Tensor:
        """Predicted features ``[B, T, H]``.

        tokens: ``[B, T]``, at position t the token x[t+1]. features: ``[B, T, H]``, at position t the feature f[t].
        positions: ``[B, T]``, default 0..T-1. mask: None for causal attention, else a boolean one,
        broadcastable to ``[B, heads, T, T]``, True where a query may look.
        remember: decoding's KV cache; the mask then spans its rows too, ``[B, heads, T, rows so far]``.
        Row t of the result predicts f[t+1].
        """
        if positions is None:
            positions = torch.arange(tokens.shape[1], device=tokens.device).unsqueeze(0)
        hidden = self.fc(self.inputs(tokens, features))
        return self.layers[0](hidden, self.rotary(hidden, positions), mask, remember)


def rotary_embedding(config: ModelConfig) -> nn.Module:
    """transformers' own rotary embedding for this config, so that every scaling the target may use is right."""
    from transformers import LlamaConfig
    from transformers.models.llama.modeling_llama import LlamaRotaryEmbedding

    raw = config.to_json(as_llama=True)
    for key in ("architectures", "model_type", "torch_dtype", "qkv_bias"):
        raw.pop(key, None)
    return LlamaRotaryEmbedding(config=LlamaConfig(**raw))


def trained_state(model: DraftModel) -> dict[str, torch.Tensor]:
    """The trainable weights by their public names."""
    return {name: parameter for name, parameter in model.named_parameters() if parameter.requires_grad}


def save_draft(model: DraftModel, folder: Path, whole: dict[str, torch.Tensor] | None = None) -> None:
    """Write ``config.json`` and ``model.safetensors`` (embedding included), a folder that loads by itself.

    whole: the weights by name, where the model itself holds only shards of them.
    """
    folder.mkdir(parents=True, exist_ok=True)
    named = dict(model.named_parameters()) if whole is None else whole
    tensors = {name: tensor.detach().cpu().contiguous() for name, tensor in named.items()}
    write_tensors(folder / WEIGHTS_FILE, tensors)
    write_json(folder / "config.json", model.config.to_json())


def read_draft_state(weights: Weights) -> dict[str, torch.Tensor]:
    """The tensors of a saved draft under their public names, whoever saved it.

    A ``model.`` prefix is taken off; rotary buffers that old scripts saved are left out.
    """
    state = {}
    for name in weights.names():
        bare = name.removeprefix("model.")
        if "rotary_emb" not in bare:
            state[bare] = weights[name]
    return state


def load_draft(folder: str | Path, embedding: torch.Tensor | None = None) -> DraftModel:
    """The draft in a checkpoint or export folder, in its stored dtype.

    embedding: the target's, for exports that leave it out.

    Raises: FileNotFoundError, RequestError (missing or misshapen tensors).
    """
    config = load_config(folder)
    weights = Weights(folder, flag="--draft-path")
    state = read_draft_state(weights)
    state.pop("lm_head.weight", None)
    stored = state.pop("embed_tokens.weight", None)
    embedding = stored if stored is not None else embedding
    if embedding is None:
        raise RequestError(f"{folder} holds no embed_tokens.weight; the target's embedding is needed beside it.")
    model = DraftModel(config, embedding, fc_bias="fc.bias" in state)
    load_trained_state(model, state, str(folder))
    return model.to(state["fc.weight"].dtype)


def load_trained_state(model: DraftModel, state: dict[str, torch.Tensor], source: str) -> None:
    """Copy weights into the draft. Raises: RequestError naming what is missing, extra or of another shape."""
    expected = {name: tuple(tensor.shape) for name, tensor in trained_state(model).items()}
    found = {name: tuple(tensor.shape) for name, tensor in state.items()}
    problems = [f"{name} is missing" for name in expected.keys() - found.keys()]
    problems += [f"{name} is not part of an EAGLE-1 draft" for name in found.keys() - expected.keys()]
    problems += [
        f"{name} is {list(found[name])}, expected {list(expected[name])}"
        for name in expected.keys() & found.keys()
        if found[name] != expected[name]
    ]
    if problems:
        raise RequestError(f"{source} does not hold a draft of this target: {'; '.join(sorted(problems))}.")
    model.load_state_dict(state, strict=False)


def describe(model: DraftModel) -> dict[str, Any]:
    """Parameter counts, for people."""
    return {"trainable": sum(p.numel() for p in model.parameters() if p.requires_grad)}
