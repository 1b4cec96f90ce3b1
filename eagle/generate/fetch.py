"""Features from a card into host memory while the card computes the next batch.

A copy into ordinary memory makes the thread that asks for it wait for all that the card was told before. Here it goes
into page-locked memory on a stream of its own: the stream waits for the forward pass, the card for nobody, and a thread
of its own for the copy alone. Buffers are a few, made once and used again.
"""

from __future__ import annotations

import queue
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import torch

from eagle import device, streams


def all_finite(features: Mapping[str, torch.Tensor]) -> torch.Tensor:
    """``[B, T]`` bool, on the CPU: whether all features at a position are finite. Waits for them."""
    return torch.stack([tensor.isfinite().all(-1).cpu() for tensor in features.values()]).all(0)


@dataclass(eq=False, slots=True)
class _Buffer:
    """Page-locked host memory that one batch at a time is copied into; it grows to the largest of them."""

    memory: torch.Tensor = field(default_factory=lambda: torch.empty(0, dtype=torch.uint8))

    def views(self, tensors: list[torch.Tensor]) -> list[torch.Tensor]:
        """Room for each of them, in its shape and dtype."""
        sizes = [-(-tensor.nbytes // 64) * 64 for tensor in tensors]  # all begin aligned
        if self.memory.nbytes < sum(sizes):
            self.memory = streams.pinned(torch.empty(sum(sizes), dtype=torch.uint8), tensors[0].device.type)
        found, start = [], 0
        for tensor, size in zip(tensors, sizes, strict=True):
            found.append(self.memory[start : start + tensor.nbytes].view(tensor.dtype).view(tensor.shape))
            start += size
        return found


class HostCopy:
    """A copy that was started: ``with copy as (features, finite)`` waits for it, and gives its buffer back at the end.

    features: as they were on the device, ``[B, T, W]`` each; finite: ``[B, T]`` bool, on the CPU; gone when the block
    ends.
    """

    def __init__(
        self, owner: HostCopies, buffer: _Buffer, sources: dict[str, torch.Tensor], views: list[torch.Tensor]
    ) -> None:
        self._owner, self._buffer, self.views = owner, buffer, views
        self._sources = sources  # whose memory must not be given to others before the copy has ended
        self.ends: list[Any] = []

    def __enter__(self) -> tuple[dict[str, torch.Tensor], torch.Tensor]:
        streams.make_current(next(iter(self._sources.values())).device)
        for end in self.ends:
            end.synchronize()
        count = len(self._sources)
        features = dict(zip(self._sources, self.views[:count], strict=True))
        self._sources = {}
        return features, torch.stack(self.views[count:]).all(0)

    def __exit__(self, *_: object) -> None:
        self._owner.take_back(self._buffer)


class HostCopies:
    """Starts copies, of which at most `buffers` are under way or being read; the next one waits for a buffer.

    backend: ``torch.cuda`` or what has its streams and events; default: that of the tensors' device.
    """

    def __init__(self, buffers: int, backend: Any = None) -> None:
        self._backend = backend
        self._free: queue.LifoQueue[_Buffer] = queue.LifoQueue()  # the one used last, so that few are ever filled
        for _ in range(buffers):
            self._free.put(_Buffer())
        self._streams: dict[torch.device, Any] = {}

    def start(self, features: dict[str, torch.Tensor]) -> HostCopy:
        """Have the features copied as soon as they are computed. They may lie on several cards."""
        buffer = self._free.get()
        places = list({tensor.device: None for tensor in features.values()})
        backend = self._backend or device.backend_of(places[0].type)
        for place in places:
            if place not in self._streams:
                self._streams[place] = backend.Stream(place)
            computed = backend.Event()
            computed.record(backend.current_stream(place))
            self._streams[place].wait_event(computed)
        finite = []
        for tensor in features.values():
            with backend.stream(self._streams[tensor.device]):
                finite.append(tensor.isfinite().all(-1))
        sources = [*features.values(), *finite]
        copy = HostCopy(self, buffer, features, buffer.views(sources))
        for view, tensor in zip(copy.views, sources, strict=True):
            stream = self._streams[tensor.device]
            with backend.stream(stream):
                view.copy_(tensor, non_blocking=True)
            tensor.record_stream(stream)
        for place in places:
            end = backend.Event()
            end.record(self._streams[place])
            copy.ends.append(end)
        return copy

    def take_back(self, buffer: _Buffer) -> None:
        """Of a copy that was read."""
        self._free.put(buffer)
