"""The releases of packages, and what older ones of torch need to do the same work."""

from __future__ import annotations

import re

import torch


def release(version: str) -> tuple[int, ...]:
    """The numbers that a version begins with: (2, 1, 0) of 2.1.0.post3 and of 2.1.0+cpu."""
    found = re.match(r"\d+(\.\d+)*", version)
    return tuple(int(part) for part in found[0].split(".")) if found else ()


TORCH = release(torch.__version__)


def let_cpus_be_set() -> None:
    """Before torch 2.2 there is no ``torch.cpu.set_device``, which accelerate calls in a group of CPU processes.

    There is nothing to set, and torch's own does nothing.
    """
    if not hasattr(torch.cpu, "set_device"):
        torch.cpu.set_device = lambda device: None  # type: ignore[assignment]
