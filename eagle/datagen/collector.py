"""From the device to the disk while the device goes on: what a worker does with the features it has computed.

The computing thread only starts forward passes. A second thread fetches their results, checks them and gathers them
in the order of the conversations; a third (the `ShardWriter`'s) scales, sums up, writes and syncs. Each is ahead of the
next by a little, so that memory stays bounded and an error ends the work soon.
"""

from __future__ import annotations

import json
from collections import deque
from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass

import torch

from eagle.cleaning import Tally
from eagle.cli import WorkError
from eagle.conversation import Encoded
from eagle.datagen.progress import Progress
from eagle.store.shard import Record, ShardWriter

#: Batches that may wait to be fetched. One is enough to keep the device busy.
_AHEAD = 2


@dataclass(frozen=True, slots=True)
class Item:
    """A conversation to be computed: its place in the worker's share, its index in the data file, its tokens."""

    position: int
    conversation: int
    encoded: Encoded


class Collector:
    """Takes the batches of one window after the other; only its own thread touches `progress`.

    Its methods raise what went wrong with the batches before: WorkError, OSError.
    """

    def __init__(self, writer: ShardWriter, progress: Progress, dtype: str) -> None:
        self.writer, self.progress, self.dtype = writer, progress, dtype
        self._records: dict[int, Record] = {}
        self._pool = ThreadPoolExecutor(1, "collector")
        self._pending: deque[Future[None]] = deque()

    def add(self, hidden: torch.Tensor, items: list[Item]) -> None:
        """Features ``[B, T, H]`` of a batch, on the device and perhaps still being computed."""
        self._submit(lambda: self._fetch(hidden, items))

    def end_window(self, size: int, tally: Tally) -> None:
        """Everything of the next `size` conversations has been added; what could not be used is in `tally`."""
        self._submit(lambda: self._store(size, tally))

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

    def _fetch(self, hidden: torch.Tensor, items: list[Item]) -> None:
        finite = torch.isfinite(hidden).all(-1).cpu()
        hidden = hidden.cpu()
        for row, item in enumerate(items):
            length = len(item.encoded.input_ids)
            if not finite[row, :length].all():
                raise WorkError(
                    f"The target's features of conversation {item.conversation} are not finite in {self.dtype}. "
                    "float16 overflows on some models: use --dtype bfloat16 or float32."
                )
            ids, mask = torch.from_numpy(item.encoded.input_ids), torch.from_numpy(item.encoded.loss_mask)
            self._records[item.position] = Record(item.conversation, ids, mask, hidden[row, :length])

    def _store(self, size: int, tally: Tally) -> None:
        progress = self.progress
        for _, record in sorted(self._records.items()):
            self.writer.add(record)
            progress.records += 1
            progress.tokens += len(record)
            progress.supervised_tokens += int(record.loss_mask.sum())
        self._records = {}
        progress.position += size
        progress.tally.add(tally)
        if self.writer.is_full:
            self._close_shard()

    def _close_shard(self) -> None:
        self.writer.close_shard(json.dumps(self.progress.to_json()))
