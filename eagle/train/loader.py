"""Batches from the store to the device while the device is at work on others.

Threads read records ahead and put them together, for a card in page-locked memory; no other process takes part, so
nothing passes through shared memory. Each batch is sent one ahead of its use, on a stream of its own, as it is stored:
see `eagle.drafts.alignment.StoredBatch`.
"""

from __future__ import annotations

import itertools
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from typing import Any, TypeVar

import torch

from eagle import device, streams
from eagle.drafts.alignment import Batch, StoredBatch
from eagle.train.dataset import FeatureDataset

#: Batches that wait for the device, a thread.
AHEAD = 2


@dataclass(frozen=True, slots=True)
class Key:
    """A micro-batch: records of a data set by index. is_empty: none of it counts; it keeps processes in step."""

    epoch: int
    indices: tuple[int, ...]
    is_empty: bool = False


Item = TypeVar("Item")
Value = TypeVar("Value")


def ahead(read: Callable[[Item], Value], items: Iterable[Item], threads: int) -> Iterator[Value]:
    """What `read` gives of each item, in their order, read ahead by so many threads; 0: when it is asked for."""
    if not threads:
        yield from map(read, items)
        return
    pool, waiting, left = ThreadPoolExecutor(threads, "ahead"), deque[Future[Value]](), iter(items)
    try:
        waiting.extend(pool.submit(read, item) for item in itertools.islice(left, AHEAD * threads))
        while waiting:
            first = waiting.popleft().result()
            waiting.extend(pool.submit(read, item) for item in itertools.islice(left, 1))
            yield first
    finally:
        pool.shutdown(wait=False, cancel_futures=True)


class Loader:
    """The micro-batches with these keys, in their order.

    threads: that read ahead; 0: each is read when it is asked for. dtype: of what the draft reads.

    Its methods raise what reading a record raises: WorkError.
    """

    def __init__(
        self, data: FeatureDataset, keys: Sequence[Key], where: torch.device, dtype: torch.dtype, threads: int
    ) -> None:
        self.data, self.keys, self.where, self.dtype = data, keys, where, dtype
        self._pool = None
        if threads:
            self._pool = ThreadPoolExecutor(threads, "loader", streams.make_current, (where,))
        self._ahead = AHEAD * threads
        self._next = 0
        self._waiting: deque[Future[StoredBatch]] = deque()
        self._sender = Sender(where)
        self._sent: tuple[StoredBatch, Sent] | None = None

    def __enter__(self) -> Loader:
        return self

    def __exit__(self, *_: object) -> None:
        if self._pool:
            self._pool.shutdown(wait=False, cancel_futures=True)

    def groups(self, size: int) -> Iterator[list[StoredBatch]]:
        """The batches as they are stored, `size` at a time: the micro-batches of one step."""
        for start in range(0, len(self.keys), size):
            yield [self._take(number) for number in range(start, min(start + size, len(self.keys)))]

    def on_device(self, group: Sequence[StoredBatch]) -> Iterator[Batch]:
        """The batches of a group, one after another; the one after each is on its way while it is used."""
        for number, stored in enumerate(group):
            sent = self._sent[1] if self._sent and self._sent[0] is stored else self._sender.send(stored)
            following = group[number + 1] if number + 1 < len(group) else self._ready()
            self._sent = (following, self._sender.send(following)) if following else None
            yield sent.arrived().prepared(self.dtype)

    def load(self, key: Key) -> StoredBatch:
        """Read one batch now."""
        batch = self.data.batch(key.epoch, key.indices)
        return batch.unsupervised() if key.is_empty else batch

    def _take(self, number: int) -> StoredBatch:
        if not self._pool:
            return self._load_ahead(self.keys[number])
        while self._next < len(self.keys) and self._next <= number + self._ahead:
            self._waiting.append(self._pool.submit(self._load_ahead, self.keys[self._next]))
            self._next += 1
        return self._waiting.popleft().result()

    def _load_ahead(self, key: Key) -> StoredBatch:
        return self._sender.pinned(self.load(key))

    def _ready(self) -> StoredBatch | None:
        """The next batch, where it has been read."""
        first = self._waiting[0] if self._waiting else None
        return first.result() if first is not None and first.done() and not first.exception() else None


@dataclass(frozen=True, slots=True)
class Sent:
    """A batch on its way to the device. event: on the stream that copies, behind the copies; None: they are done."""

    batch: StoredBatch
    event: Any = None

    def arrived(self) -> StoredBatch:
        """The batch, for what is computed from now on."""
        if self.event is not None:
            streams.wait_for(self.event, self.batch.tensors())
        return self.batch


class Sender:
    """Copies batches to a device."""

    def __init__(self, where: torch.device) -> None:
        self.where = where
        self._stream = streams.new_stream(where)

    def pinned(self, batch: StoredBatch) -> StoredBatch:
        """In memory from which the device copies by itself, and in a dtype that it can unpack."""
        if self._stream is None:
            return batch
        if not device.has_float8(self.where.type):
            batch = batch.without_float8()
        return batch.with_tensors([streams.pinned(tensor, self.where.type) for tensor in batch.tensors()])

    def send(self, batch: StoredBatch) -> Sent:
        """Begin to copy a batch, of which this is told once."""
        if self._stream is None:
            return Sent(batch)
        with streams.on_stream(self._stream):
            return Sent(batch.to(self.where), self._stream.record_event())
