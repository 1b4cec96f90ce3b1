"""What a draft may start from, and what a family's start is given to look at."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass

import torch

from eagle.drafts.alignment import Example
from eagle.drafts.network import DraftNetwork


@dataclass(frozen=True, slots=True)
class StartData:
    """What this process shows a start.

    examples: its share of the training examples, shuffled, without noise. positions: the supervised positions to look
    at, at most. max_len: tokens that records were cut to, for messages.

    What follows is done by all processes together. count: sums integers over them. reduce: sums a float64 tensor, which
    it may overwrite, and gives it on the CPU of the main process, None on others. broadcast: gives a tensor the main
    process's values, in place.
    """

    examples: Iterator[Example]
    positions: float
    max_len: int
    device: torch.device
    count: Callable[..., list[int]]
    reduce: Callable[[torch.Tensor], torch.Tensor | None]
    broadcast: Callable[[torch.Tensor], None]


#: Gives the network its first weights, the same on every process; what it did, for people (empty: nothing).
Start = Callable[[DraftNetwork, StartData], str]


def random(network: DraftNetwork, data: StartData) -> str:
    """As it was built."""
    return ""
