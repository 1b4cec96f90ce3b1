"""Several draft steps at once, for every position in parallel: what a chain of drafts would have computed.

A chain that starts at position b reads the target's features up to b and its own outputs after that. Step k at
position t belongs to the chain that started at ``b = t - k + 1``:

    reads    token x[t+1] and, as its feature, step k-1's output at position t-1   (step 1: the target's f[t])
    attends  to step 1's keys at positions 0..b, and to step j's key at position b + j - 1, for j = 2..k

So one attention over the keys of all steps so far, with the right mask, drafts for all chains together
(HASS, arXiv 2408.15766; "training-time test" in EAGLE-3, arXiv 2503.01840). The same forward trains on the draft's own
features and measures how far its chains would get.
"""

from __future__ import annotations

import torch
from torch import nn

from eagle.drafts.chain_attention import ChainMask
from eagle.drafts.network import DraftNetwork


class UnrolledDraft(nn.Module):
    """A draft whose forward takes several steps; the module that is wrapped for distributed training."""

    def __init__(self, draft: DraftNetwork) -> None:
        super().__init__()
        self.draft = draft

    def forward(self, tokens: torch.Tensor, features: torch.Tensor, steps: int = 1) -> torch.Tensor:
        """What a head reads, ``[steps, B, T, H]``; row t of every step belongs to position t+1.

        tokens: ``[B, T]``, x[t+1] at position t. features: ``[B, T, W]``, the target's at position t. Rows t < k - 1 of
        step k belong to no chain and mean nothing. A step's output is detached before the next reads it, as a server's
        is.
        """
        length = tokens.shape[1]
        positions = torch.arange(length, device=tokens.device).unsqueeze(0)
        keys: list[torch.Tensor] = []
        values: list[torch.Tensor] = []

        def remember(key: torch.Tensor, value: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
            keys.append(key)
            values.append(value)
            return torch.cat(keys, 2), torch.cat(values, 2)

        states = self.draft.read(features)
        dtype, outputs = states.dtype, []
        for step in range(1, steps + 1):
            mask = None if step == 1 else ChainMask(length, step)
            states = self.draft(tokens, states, positions, mask, remember)
            outputs.append(self.draft.for_head(states))
            states = nn.functional.pad(states.detach()[:, :-1], (0, 0, 1, 0)).to(dtype)
        return torch.stack(outputs)


def chain_supervision(supervised: torch.Tensor, steps: int) -> torch.Tensor:
    """``[..., T]`` bool -> ``[steps, ..., T]``: where step k's whole chain lies in a reply."""
    levels = [supervised]
    for _ in range(1, steps):
        levels.append(supervised & nn.functional.pad(levels[-1][..., :-1], (1, 0)))
    return torch.stack(levels)
