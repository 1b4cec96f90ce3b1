"""What an accelerator and its host do side by side: page-locked memory, copies on streams, times without waiting."""

from __future__ import annotations

import contextlib
import itertools
import time
from collections.abc import Sequence
from contextlib import AbstractContextManager
from typing import Any

import torch

from eagle.device import VISIBILITY_VARIABLE, backend_of, synchronize, with_index
from eagle.releases import TORCH


def make_current(device: torch.device) -> None:
    """Have this thread work on that card: a thread of its own may have none. Nothing on a CPU."""
    if device.type in VISIBILITY_VARIABLE:
        backend_of(device.type).set_device(with_index(device))


def pinned(tensor: torch.Tensor, kind: str) -> torch.Tensor:
    """A copy in page-locked memory, which a card of that kind copies to and from by itself.

    The tensor itself where there is none of that: copies are then right, and slower.
    """
    if kind not in VISIBILITY_VARIABLE:
        return tensor
    # Before torch 2.8 another kind than CUDA has to be named; since then naming one is deprecated.
    with contextlib.suppress(RuntimeError):  # torch_npu before it had any; the system's limit is reached
        return tensor.pin_memory(kind) if kind != "cuda" and TORCH < (2, 8) else tensor.pin_memory()
    return tensor


def to_card(tensor: torch.Tensor, device: torch.device) -> torch.Tensor:
    """A CPU tensor on the device, without waiting for what that is doing where there is page-locked memory."""
    return send(pinned(tensor, device.type), device)


def send(tensor: torch.Tensor, device: torch.device) -> torch.Tensor:
    """A tensor on the device: from page-locked memory without waiting.

    Any other memory may be given to somebody else before a card has read it.
    """
    kind = device.type
    if kind not in VISIBILITY_VARIABLE:
        return tensor.to(device)
    # As with `pinned`, so with the question.
    locked = tensor.is_pinned(kind) if kind != "cuda" and TORCH < (2, 8) else tensor.is_pinned()
    return tensor.to(device, non_blocking=locked)


def new_stream(device: torch.device) -> Any:
    """A stream beside the one that computes, for copies; None on a CPU."""
    return None if device.type == "cpu" else backend_of(device.type).Stream(with_index(device))


def wait_for(event: Any, tensors: Sequence[torch.Tensor]) -> None:
    """Have this thread's stream of their device wait for an event of another stream, which made these tensors."""
    stream = backend_of(tensors[0].device.type).current_stream(tensors[0].device)
    stream.wait_event(event)
    for tensor in tensors:  # their memory is the other stream's, which must not take it back while this one reads
        tensor.record_stream(stream)


def on_stream(stream: Any) -> AbstractContextManager[Any]:
    """Have what is asked of the device in this thread run on that stream."""
    return backend_of(stream.device.type).stream(stream)


class Clock:
    """Times what a device is given to do, without waiting for it: marks between the parts, read at the end."""

    def __init__(self, device: torch.device) -> None:
        self.device = with_index(device)
        self._marks: list[Any] = []
        self.mark()

    def mark(self) -> None:
        if self.device.type == "cpu":
            self._marks.append(time.perf_counter())
            return
        backend = backend_of(self.device.type)
        event = backend.Event(enable_timing=True)
        event.record(backend.current_stream(self.device))
        self._marks.append(event)

    def seconds(self) -> list[float]:
        """Between each two marks; waits until the device has come to the last one."""
        synchronize(self.device)
        pairs = itertools.pairwise(self._marks)
        if self.device.type == "cpu":
            return [after - before for before, after in pairs]
        return [before.elapsed_time(after) / 1000 for before, after in pairs]
