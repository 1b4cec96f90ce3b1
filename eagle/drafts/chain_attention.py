"""Attention of one unrolled draft step over the keys of all steps so far; see `eagle.drafts.unroll`.

Row t of step k belongs to the chain that began at ``b = t - k + 1``. It looks at step 1's keys at positions 0..b and at
one key of each later step, that of its own chain. A mask over all keys of all steps would be nearly empty, and the work
would grow with the square of the length at every step; here some chains go through the attention at a time, with the
keys of step 1 up to them and their own of the later steps.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch.nn import functional

#: Chains that go through the attention together: at least so many, in at most so many pieces, each of which keeps a
#: copy of the keys before it for the backward pass.
LEAST, PIECES = 128, 4

#: queries, keys, values and where a query may look -> what it sees, ``[B, heads, rows, head_dim]``.
MaskedAttention = Callable[[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor], torch.Tensor]


@dataclass(frozen=True, slots=True)
class ChainMask:
    """Of step `step`, 2 or later, over `length` positions."""

    length: int
    step: int

    def shapes(self) -> list[tuple[int, int]]:
        """Queries and keys of every piece."""
        chains = max(self.length - self.step + 1, 0)
        size = max(LEAST, -(-chains // PIECES))
        pieces = [(start, min(size, chains - start)) for start in range(0, chains, size)]
        return [(rows, start + self.step * rows) for start, rows in pieces]

    def attend(
        self, attention: MaskedAttention, queries: torch.Tensor, keys: torch.Tensor, values: torch.Tensor
    ) -> torch.Tensor:
        """``[B, heads, T, head_dim]``; rows that belong to no chain see nothing.

        queries: the step's ``[B, heads, T, head_dim]``. keys, values: of all steps, one after another, ``[B, kv_heads,
        step * T, head_dim]``.
        """
        sizes = [rows for rows, _ in self.shapes()]
        skipped = self.length - sum(sizes)
        if not sizes:
            return torch.zeros_like(queries)
        asked = queries[:, :, skipped:].split(sizes, dim=2)
        kept = [self._by_chain(states, sizes) for states in (keys, values)]
        seen = []
        for number, query in enumerate(asked):
            own_keys, own_values = (
                torch.cat([*steps[0][: number + 1], *(later[number] for later in steps[1:])], dim=2) for steps in kept
            )
            seen.append(attention(query, own_keys, own_values, self.piece(number, queries.device)))
        return functional.pad(torch.cat(seen, dim=2), (0, 0, skipped, 0))

    def _by_chain(self, states: torch.Tensor, sizes: list[int]) -> list[tuple[torch.Tensor, ...]]:
        """Every step's, by the chains whose they are, in pieces."""
        chains = sum(sizes)
        return [
            one[:, :, step : step + chains].split(sizes, dim=2)
            for step, one in enumerate(states.split(self.length, dim=2))
        ]

    def piece(self, number: int, device: torch.device) -> torch.Tensor:
        """Where the chains of a piece may look, ``[rows, keys]`` bool."""
        rows, keys = self.shapes()[number]
        positions = torch.arange(keys - (self.step - 1) * rows, device=device)
        own = positions[-rows:]
        first, later = positions <= own[:, None], own == own[:, None]
        return torch.cat((first, *[later] * (self.step - 1)), dim=1)


#: Where rows may look: causally, where a tensor is True (or 0), or as an unrolled step's chains do.
Mask = torch.Tensor | ChainMask | None
