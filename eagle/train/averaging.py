"""An average of the draft's weights over training (``--ema``), which is what is validated, saved and exported.

The average of a weight lives in the optimizer's state beside AdamW's moments, so it is sharded, saved and resumed with
them. While something looks at the draft the two change places, and a checkpoint is written then: its draft is the
average, and its optimizer's state holds the weight that training goes on with.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch

AVERAGE = "average"


def decay_at(step: int, decay: float) -> float:
    """Less at the beginning, so that the average soon forgets where training started. step: from 1."""
    return min(decay, (1 + step) / (10 + step))


@torch.no_grad()
def update(optimizer: Any, step: int, decay: float) -> None:
    """Take the weights behind optimizer step `step` into their averages; 0 keeps none."""
    if not decay:
        return
    for parameter, state in optimizer.state.items():
        if AVERAGE in state:
            state[AVERAGE].lerp_(parameter, 1 - decay_at(step, decay))
        else:
            state[AVERAGE] = parameter.detach().clone()


@contextmanager
def averaged(optimizer: Any, model: torch.nn.Module | None = None) -> Iterator[None]:
    """The draft has the averages as its weights, where there are any. model: what is run meanwhile."""
    if not any(AVERAGE in state for state in optimizer.state.values()):
        yield
        return
    swap(optimizer)
    try:
        yield
    finally:
        swap(optimizer)
        units: Any = model.modules() if model is not None else ()
        for unit in units:
            if hasattr(unit, "reshard"):  # of FSDP, whose units may still hold what they gathered
                unit.reshard()


@torch.no_grad()
def swap(optimizer: Any) -> None:
    """Every weight and its average change places."""
    for parameter, state in optimizer.state.items():
        if AVERAGE in state:
            weight = parameter.detach().clone()
            parameter.copy_(state[AVERAGE])
            state[AVERAGE].copy_(weight)
