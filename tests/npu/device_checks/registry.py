"""The checks by name, and what they are made of."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator
from typing import Any

import torch

CARDS, MEMORY = 4, 256 << 20

CHECKS: dict[str, Callable[[], None]] = {}


def check(name: str) -> Callable[[Callable[[], None]], Callable[[], None]]:
    def keep(function: Callable[[], None]) -> Callable[[], None]:
        assert name not in CHECKS
        CHECKS[name] = function
        return function

    return keep


@contextlib.contextmanager
def refused(words: str) -> Iterator[None]:
    try:
        yield
    except (RuntimeError, ValueError, TypeError) as error:
        assert words in str(error), f"expected {words!r} in: {error}"
    else:
        raise AssertionError(f"nothing refused it: {words!r}")


def npu() -> Any:
    return torch.npu  # type: ignore[attr-defined]


def numbers(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


#: What a check of operators begins with, on the CPU: floats, a mask and indices.
FLOATS, MASK, IDS = numbers(4, 6), numbers(4, 6, seed=1) > 0, torch.tensor([3, 0, 2])
