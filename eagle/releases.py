"""The release of torch, and what older ones need to do the same work."""

from __future__ import annotations

import torch

from eagle.versions import release

TORCH = release(torch.__version__)


def let_cpus_be_set() -> None:
    """Before torch 2.2 there is no ``torch.cpu.set_device``, which accelerate calls in a group of CPU processes.

    There is nothing to set, and torch's own does nothing.
    """
    if not hasattr(torch.cpu, "set_device"):
        torch.cpu.set_device = lambda device: None  # type: ignore[assignment]
