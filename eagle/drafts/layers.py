"""The parts that draft networks are built from: their parameters carry the public key names."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch import nn
from torch.nn import functional

from eagle.drafts.chain_attention import ChainMask, Mask
from eagle.errors import RequestError
from eagle.releases import TORCH
from eagle.target.config import ModelConfig


def biases_among(names: Iterable[str]) -> dict[str, Any]:
    """Which biases a layer with tensors of these names has, as its config says it: of attention all or none."""
    biases = [name for name in names if name.endswith(".bias")]
    attention = any(".self_attn." in name for name in biases)
    return {"qkv_bias": attention, "o_bias": attention, "mlp_bias": any(".mlp." in name for name in biases)}


class Attention(nn.Module):
    """Grouped-query self-attention in the public key names. inputs: what it reads is so wide (default: H)."""

    def __init__(self, config: ModelConfig, inputs: int | None = None) -> None:
        super().__init__()
        self.heads, self.kv_heads, self.head_dim = (
            config.num_attention_heads,
            config.num_key_value_heads,
            config.head_dim,
        )
        size, bias = inputs or config.hidden_size, config.qkv_bias
        self.q_proj = nn.Linear(size, self.heads * self.head_dim, bias=bias)
        self.k_proj = nn.Linear(size, self.kv_heads * self.head_dim, bias=bias)
        self.v_proj = nn.Linear(size, self.kv_heads * self.head_dim, bias=bias)
        self.o_proj = nn.Linear(self.heads * self.head_dim, config.hidden_size, bias=config.o_bias)

    def project(
        self, hidden: torch.Tensor, rotary: tuple[torch.Tensor, torch.Tensor]
    ) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """Queries ``[B, heads, T, head_dim]``, keys and values ``[B, kv_heads, T, head_dim]``, rotated."""
        batch, length, _ = hidden.shape

        def split(projected: torch.Tensor, heads: int) -> torch.Tensor:
            return projected.view(batch, length, heads, self.head_dim).transpose(1, 2)

        queries, keys = split(self.q_proj(hidden), self.heads), split(self.k_proj(hidden), self.kv_heads)
        return rotate(queries, rotary), rotate(keys, rotary), split(self.v_proj(hidden), self.kv_heads)

    def attend(self, queries: torch.Tensor, keys: torch.Tensor, values: torch.Tensor, mask: Mask) -> torch.Tensor:
        """Attention output ``[B, T, H]``. mask: None for causal, else True (or 0) where a query may look."""
        if isinstance(mask, ChainMask):
            mixed = mask.attend(self._mix, queries, keys, values)
        else:
            mixed = self._mix(queries, keys, values, mask)
        return self.o_proj(mixed.transpose(1, 2).flatten(2))

    def _mix(
        self, queries: torch.Tensor, keys: torch.Tensor, values: torch.Tensor, mask: torch.Tensor | None
    ) -> torch.Tensor:
        groups = self.heads // self.kv_heads
        if groups > 1:  # torch before 2.5 knows no grouped queries
            keys, values = repeated(keys, groups), repeated(values, groups)
        if mask is not None and queries.is_cuda and TORCH < (2, 5):
            # CUDA's kernel for masks returned garbage of what is not contiguous (pytorch issue 112577); not run here.
            queries, keys, values = queries.contiguous(), keys.contiguous(), values.contiguous()
        return functional.scaled_dot_product_attention(
            queries, keys, values, attn_mask=mask, is_causal=mask is None, scale=1 / math.sqrt(self.head_dim)
        )


def repeated(heads: torch.Tensor, groups: int) -> torch.Tensor:
    """Each of the heads ``[B, kv_heads, T, head_dim]`` `groups` times in a row: ``[B, heads, T, head_dim]``.

    Not by ``repeat_interleave``, which Ascend documents for results of fewer than 2^22 values.
    """
    return heads.unsqueeze(2).expand(-1, -1, groups, -1, -1).flatten(1, 2)


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


class RotaryEmbedding(nn.Module):
    """transformers' own rotary embedding for a config, so that every scaling the target may use is right.

    Its frequencies stay in float32 whatever dtype the network around it is cast to: rounded to bfloat16 they turn a
    position of a few hundred tokens by a wrong angle, and fewer tokens are accepted the longer the context is.
    """

    def __init__(self, config: ModelConfig) -> None:
        from transformers import LlamaConfig
        from transformers.models.llama.modeling_llama import LlamaRotaryEmbedding

        super().__init__()
        raw = config.to_json(as_llama=True)
        for key in ("architectures", "model_type", "torch_dtype", "qkv_bias"):
            raw.pop(key, None)
        try:
            theirs = LlamaConfig(**raw)
        except Exception as error:  # of transformers' own kinds, which change from release to release
            said = " ".join(str(error).split())
            raise RequestError(
                f"a draft of hidden_size {config.hidden_size} with {config.num_attention_heads} heads is no layer that "
                f"transformers, and with it vLLM, makes: {said}."
            ) from None
        self.embedding = LlamaRotaryEmbedding(config=theirs)

    def forward(self, hidden: torch.Tensor, positions: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """cos and sin ``[B, T, head_dim]`` in the dtype of `hidden`, of positions ``[B, T]``."""
        return self.embedding(hidden, positions)

    def _apply(self, fn: Callable[[torch.Tensor], torch.Tensor], recurse: bool = True) -> RotaryEmbedding:
        """What `to`, `cuda`, `bfloat16` and the like do to a module: devices are taken over, dtypes are not."""
        before = {name: buffer for name, buffer in self.embedding.named_buffers()}
        super()._apply(fn, recurse)
        for name, buffer in before.items():
            moved = getattr(self.embedding, name)
            if moved.dtype != buffer.dtype:
                setattr(self.embedding, name, buffer.to(moved.device))
        return self
