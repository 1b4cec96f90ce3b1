"""Which of the target's tokens an EAGLE-3 draft chooses among: those that replies are made of."""

from __future__ import annotations

import numpy as np

#: Below this share of the positions a draft misses so much that a larger vocabulary is worth its time.
LOW_COVERAGE = 0.9


def most_frequent(counts: np.ndarray, size: int) -> np.ndarray:
    """The `size` most frequent tokens, ascending; among equals the smaller ids. counts: ``[V]``."""
    order = np.lexsort((np.arange(len(counts)), -counts))
    return np.sort(order[:size])


def coverage(counts: np.ndarray, ids: np.ndarray) -> float:
    """Share of the positions whose token is among `ids`."""
    return float(counts[ids].sum() / max(counts.sum(), 1))


def coverage_notes(counts: np.ndarray, ids: np.ndarray) -> list[str]:
    """What a draft that chooses among these tokens can be right about, for people. counts: ``[V]``."""
    share, size = coverage(counts, ids), len(ids)
    notes = [f"the draft chooses among {size:,} of {len(counts):,} tokens: {share:.1%} of the supervised positions"]
    if share < LOW_COVERAGE:
        notes.append(
            f"at {1 - share:.1%} of the positions the draft cannot be right: raise --draft_vocab_size above {size:,}"
        )
    return notes
