"""How much of what replies are made of a draft with a vocabulary of its own can be right about."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

#: Below this share of the positions a draft misses so much that a larger vocabulary is worth its time.
ENOUGH = 0.9


@dataclass(frozen=True, slots=True)
class Coverage:
    """drafted: how many of the target's tokens, of which there are `vocabulary`, the draft chooses among. share: of the
    supervised positions those whose token is among them. enough: how many tokens would cover `ENOUGH` of them."""

    drafted: int
    vocabulary: int
    share: float
    enough: int

    @property
    def is_low(self) -> bool:
        return self.share < ENOUGH

    def describe(self) -> str:
        return (
            f"the draft chooses among {self.drafted:,} of {self.vocabulary:,} tokens: {self.share:.1%} of the "
            "supervised positions"
        )


def coverage(counts: np.ndarray, ids: np.ndarray) -> Coverage:
    """Of a draft that chooses among `ids` ``[D]``. counts: ``[V]``, how often each token is supervised."""
    total, falling = counts.sum(), np.sort(counts)[::-1].cumsum()
    enough = int(np.searchsorted(falling, ENOUGH * total)) + 1
    return Coverage(len(ids), len(counts), float(counts[ids].sum() / max(total, 1)), enough)
