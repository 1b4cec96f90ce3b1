"""From the device to the disk while the device goes on: what a worker does with the features it has computed.

The computing thread only starts forward passes. A second thread fetches their results, checks and scales them; a third
(the `ShardWriter`'s) sums up, writes and syncs. Each is ahead of the next by a little, so that an error ends the work
soon and memory stays bounded: a shard that is gathered, the one before while it is written, and a few batches. On a
CPU, whose results need no fetching, the first two are one.
"""

from __future__ import annotations

import json
from collections import deque
from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass

import torch

from eagle.data.loss_mask import Encoded
from eagle.errors import WorkError
from eagle.generate.progress import Progress
from eagle.store.record import Record
from eagle.store.writer import ShardWriter
from eagle.target.features import HIDDEN_STATE

#: Batches that may wait to be fetched. One is enough to keep the device busy.
_AHEAD = 2


@dataclass(frozen=True, slots=True)
class Item:
    """A conversation to be computed: its index in the data file, its tokens."""

    conversation: int
    encoded: Encoded


class NotFinite(WorkError):
    """The target's features overflow in this dtype: the same command would find the same."""


def check_finite(finite: torch.Tensor, items: list[Item], dtype: str) -> None:
    """finite: ``[B, T]`` bool, of the batch of these conversations; rows beyond their lengths mean nothing.

    Raises: NotFinite.
    """
    for row, item in enumerate(items):
        if not finite[row, : len(item.encoded.input_ids)].all():
            raise NotFinite(
                f"The target's features of conversation {item.conversation} are not finite in {dtype}. "
                "float16 overflows on some models: use --dtype bfloat16 or float32."
            )


def all_finite(features: dict[str, torch.Tensor]) -> torch.Tensor:
    """``[B, T]`` bool, on the CPU: whether all features at a position are finite."""
    return torch.stack([tensor.isfinite().all(-1).cpu() for tensor in features.values()]).all(0)


class Collector:
    """Takes one batch after the other and closes a shard behind any; one thread only touches `progress`.

    batches, shards: how many batches come and how many shards they have to become; None: as many as they fill.

    Its methods raise what went wrong with the batches before: WorkError, OSError.
    """

    def __init__(
        self, writer: ShardWriter, progress: Progress, dtype: str, batches: int = 0, shards: int | None = None
    ) -> None:
        self.writer, self.progress, self.dtype = writer, progress, dtype
        self._batches, self._shards = batches, shards
        self._pool = ThreadPoolExecutor(1, "collector")
        self._pending: deque[Future[None]] = deque()

    def add(self, features: dict[str, torch.Tensor], items: list[Item]) -> None:
        """Features of a batch by name, ``[B, T, W]`` each, on the device and perhaps still being computed."""
        if all(tensor.device.type == "cpu" for tensor in features.values()):  # nothing to wait for
            self._store(features, items)
        else:
            self._submit(lambda: self._store(features, items))

    def close(self) -> None:
        """Write what is left and wait for it."""
        self._submit(self._close_shard)
        while self._pending:
            self._pending.popleft().result()
        self.writer.wait()
        self._pool.shutdown()

    def _submit(self, work: Callable[[], None]) -> None:
        self._pending.append(self._pool.submit(work))
        while len(self._pending) > _AHEAD:
            self._pending.popleft().result()

    def _store(self, features: dict[str, torch.Tensor], items: list[Item]) -> None:
        check_finite(all_finite(features), items, self.dtype)
        features = {name: tensor.cpu() for name, tensor in features.items()}
        for row, item in enumerate(items):
            length = len(item.encoded.input_ids)
            ids, mask = torch.from_numpy(item.encoded.input_ids), torch.from_numpy(item.encoded.loss_mask)
            own = {name: tensor[row, :length] for name, tensor in features.items()}
            self.writer.add(Record(item.conversation, ids, mask, own.pop(HIDDEN_STATE), own))
            self.progress.records += 1
            self.progress.tokens += length
            self.progress.supervised_tokens += int(item.encoded.loss_mask.sum())
        self._batches -= 1
        if self._is_closed_here():
            self._close_shard()

    def _is_closed_here(self) -> bool:
        if self._shards is None:
            return self.writer.is_full
        # The last shard takes what is left; a batch each where else there would be too few.
        if self._shards == 1 or not (self.writer.is_full or self._batches < self._shards):
            return False
        self._shards -= 1
        return True

    def _close_shard(self) -> None:
        self.writer.close_shard(json.dumps(self.progress.to_json()))
