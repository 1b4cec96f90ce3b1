"""How much of what replies are made of a draft with a vocabulary of its own can be right about."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

#: Below this share of the positions a draft misses so much that a larger vocabulary is worth its time.
ENOUGH = 0.9
#: A vocabulary that covers so much is nearly as often right, and where drafting is a large part of a step quicker.
MOST = 0.95


@dataclass(frozen=True, slots=True)
class Coverage:
    """drafted: how many of the target's tokens, of which there are `vocabulary`, the draft chooses among. share: of the
    supervised positions those whose token is among them. enough, most: how many tokens would cover `ENOUGH` and `MOST`
    of them."""

    drafted: int
    vocabulary: int
    share: float
    enough: int
    most: int

    @property
    def is_low(self) -> bool:
        return self.share < ENOUGH

    def describe(self) -> str:
        said = (
            f"the draft chooses among {self.drafted:,} of {self.vocabulary:,} tokens: {self.share:.1%} of the "
            "supervised positions"
        )
        return f"{said}; {self.most:,} of them are {MOST:.0%}" if 2 * self.most <= self.drafted else said


def coverage(counts: np.ndarray, ids: np.ndarray) -> Coverage:
    """Of a draft that chooses among `ids` ``[D]``. counts: ``[V]``, how often each token is supervised."""
    total, falling = counts.sum(), np.sort(counts)[::-1].cumsum()
    enough, most = (int(np.searchsorted(falling, share * total)) + 1 for share in (ENOUGH, MOST))
    return Coverage(len(ids), len(counts), float(counts[ids].sum() / max(total, 1)), enough, most)
