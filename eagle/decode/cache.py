"""Preallocated key-value caches: one for the target's layers, one for the draft's.

Both hold row t of the sequence at index t. New rows are written behind the kept ones; after verification the rows of
accepted nodes move up and the rest is forgotten by not counting it.
"""

from __future__ import annotations

from typing import Any

import torch
from transformers.cache_utils import Cache

from eagle.target.config import ModelConfig


class TargetCache(Cache):
    """The target's cache in the interface that transformers' models call (4.45 to 5.x).

    devices: where each of its layers lives. length: rows kept; a forward pass writes behind them and counts nothing.
    """

    is_compileable = False

    def __init__(self, config: ModelConfig, rows: int, devices: list[torch.device], dtype: torch.dtype) -> None:
        if issubclass(Cache, torch.nn.Module):  # transformers up to 4.48
            torch.nn.Module.__init__(self)  # type: ignore[arg-type]
        self.layers: list[Any] = []  # transformers' own storage, unused
        self.length = 0
        shape = (1, config.num_key_value_heads, rows, config.head_dim)
        # One block a device, so that moving rows is one operation and not one a layer.
        self._blocks = [
            torch.empty(devices.count(device), 2, *shape, dtype=dtype, device=device)
            for device in dict.fromkeys(devices)
        ]
        slots = {block.device: iter(block) for block in self._blocks}
        self._of_layer = [next(slots[device]) for device in devices]

    def update(
        self, key_states: torch.Tensor, value_states: torch.Tensor, layer_idx: int, *args: Any, **kwargs: Any
    ) -> tuple[torch.Tensor, torch.Tensor]:
        keys, values = self._of_layer[layer_idx]
        end = self.length + key_states.shape[-2]
        keys[:, :, self.length : end] = key_states
        values[:, :, self.length : end] = value_states
        return keys[:, :, :end], values[:, :, :end]

    def keep(self, count: int, rows: torch.Tensor | None = None) -> None:
        """Keep `count` rows of the last pass right behind the rows kept before: its first ones, or `rows` in order."""
        if rows is not None:
            for block in self._blocks:
                kept = block[..., rows.to(block.device) + self.length, :]
                block[..., self.length : self.length + count, :] = kept
        self.length += count

    def get_seq_length(self, *args: Any, **kwargs: Any) -> int:
        return self.length

    def get_query_offset(self, *args: Any, **kwargs: Any) -> int:
        return self.length

    def get_mask_sizes(  # type: ignore[override]  # transformers 4 passes the positions, 5 how many there are
        self, query: int | torch.Tensor, *args: Any, **kwargs: Any
    ) -> tuple[int, int]:
        new = query if isinstance(query, int) else query.shape[0]
        return self.length + new, 0


class DraftCache:
    """The draft's single layer. length: rows of the true sequence; drafted rows stand behind them until `forget`."""

    def __init__(self, config: ModelConfig, rows: int, device: torch.device, dtype: torch.dtype) -> None:
        shape = (2, 1, config.num_key_value_heads, rows, config.head_dim)
        self._keys, self._values = torch.empty(shape, dtype=dtype, device=device)
        self.length = self._end = 0

    def remember(self, keys: torch.Tensor, values: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Write rows behind all others and give all of them; what a `DraftNetwork` calls."""
        start, self._end = self._end, self._end + keys.shape[-2]
        self._keys[:, :, start : self._end] = keys
        self._values[:, :, start : self._end] = values
        return self._keys[:, :, : self._end], self._values[:, :, : self._end]

    def keep(self) -> None:
        """Everything remembered so far belongs to the true sequence."""
        self.length = self._end

    def forget(self, length: int | None = None) -> None:
        """Drop the drafted rows; with a length, the true ones from there on too."""
        if length is not None:
            self.length = length
        self._end = self.length
