"""Which of the target's tokens an EAGLE-3 draft chooses among: those that replies are made of."""

from __future__ import annotations

import numpy as np


def most_frequent(counts: np.ndarray, size: int) -> np.ndarray:
    """The `size` most frequent tokens, ascending; among equals the smaller ids. counts: ``[V]``."""
    order = np.lexsort((np.arange(len(counts)), -counts))
    return np.sort(order[:size])
