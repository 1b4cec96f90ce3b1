"""The target as decoding uses it: features of new tokens behind a cache, and their logits."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch.nn import functional

from eagle.decode.cache import TargetCache
from eagle.files import existing_path
from eagle.target.config import ModelConfig, load_config
from eagle.target.features import HIDDEN_STATE, features_of
from eagle.target.trunk import load_trunk, parts_of
from eagle.target.weights import Weights, read_head


@dataclass(frozen=True, slots=True)
class Target:
    """The frozen target. trunk: without its ``lm_head``. head: ``[V, H]``, where the features come out."""

    config: ModelConfig
    trunk: torch.nn.Module
    head: torch.Tensor

    @property
    def embedding(self) -> torch.Tensor:
        """``[V, H]``."""
        return parts_of(self.trunk, self.config).embedding

    @property
    def device(self) -> torch.device:
        """Where tokens go in and features come out (accelerate moves what is between, where layers are spread)."""
        return self.head.device

    def new_cache(self, rows: int) -> TargetCache:
        devices = [next(layer.parameters()).device for layer in parts_of(self.trunk, self.config).layers]
        return TargetCache(self.config, rows, devices, self.head.dtype)

    def features(
        self,
        tokens: torch.Tensor,
        cache: TargetCache,
        tree: tuple[torch.Tensor, torch.Tensor] | None = None,
        names: Iterable[str] = (HIDDEN_STATE,),
    ) -> dict[str, torch.Tensor]:
        """Features by name, ``[T, W]`` each, of the tokens ``[T]`` that follow the cache's rows.

        tree: depths ``[T]`` and ancestors ``[T, T]`` where the tokens are not a sequence.
        """
        start, count = cache.length, len(tokens)
        mask: Any = None
        if tree is None:
            positions = torch.arange(start, start + count, device=tokens.device)
        else:
            positions = tree[0] + start
            mask = tree_mask(self.trunk.config, tree[1], positions, start, self.head.dtype)
        found = features_of(
            self.trunk,
            names,
            input_ids=tokens[None],
            position_ids=positions[None],
            attention_mask=mask,
            past_key_values=cache,
            use_cache=True,
        )
        return {name: features[0].to(self.device) for name, features in found.items()}

    def logits(self, hidden_state: torch.Tensor) -> torch.Tensor:
        """``[..., V]`` from last hidden states ``[..., H]``."""
        return functional.linear(hidden_state, self.head)


def tree_mask(
    config: Any, ancestors: torch.Tensor, positions: torch.Tensor, before: int, dtype: torch.dtype
) -> torch.Tensor | dict[str, torch.Tensor] | None:
    """The attention mask of a tree's nodes behind `before` rows, as transformers' model of that config takes it.

    ancestors: ``[T, T]`` bool, True where a node sees another. positions: ``[T]``. Layers with a window see what lies
    less than that behind them; where some have one and others none, their masks go by the layers' kinds.

    None for a single token, whose mask is the usual one.
    """
    if len(ancestors) == 1:
        return None
    whole = functional.pad(ancestors, (before, 0), value=True)
    window, kinds = getattr(config, "sliding_window", None), set(getattr(config, "layer_types", None) or ())
    if window is None or kinds == {"full_attention"}:
        return attention_bias(whole, dtype)
    rows = torch.cat([torch.arange(before, device=positions.device), positions])
    near = attention_bias(whole & (positions[:, None] - rows < window), dtype)
    return {"full_attention": attention_bias(whole, dtype), "sliding_attention": near} if kinds else near


def attention_bias(visible: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    """The mask ``[1, 1, T, rows]`` that transformers adds to attention scores. visible: ``[T, rows]`` bool."""
    bias = torch.zeros(visible.shape, dtype=dtype, device=visible.device)
    return bias.masked_fill_(~visible, torch.finfo(dtype).min)[None, None]


def load_target(folder: Path, dtype: torch.dtype, device: torch.device, *, spread: bool = False) -> Target:
    """Raises: FileNotFoundError, RequestError."""
    existing_path(folder, "--base-path", "folder")
    config = load_config(folder)
    head = read_head(Weights(folder, flag="--base-path"), config)
    trunk = load_trunk(folder, dtype, device, spread=spread)
    parts = parts_of(trunk, config)
    device, embedding = parts.norm.device, parts.embedding
    shared = config.shares_head and embedding.device == device
    return Target(config, trunk, embedding.data if shared else head.to(device, dtype))
