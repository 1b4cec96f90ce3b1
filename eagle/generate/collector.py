"""From the device to the disk while the device goes on: what a worker does with the features it has computed.

The computing thread only starts forward passes, and copies of their results (`eagle.generate.fetch`). A second thread
waits for these, checks and scales them; a third
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
from eagle.generate.fetch import HostCopies, HostCopy, all_finite
from eagle.generate.progress import Progress
from eagle.store.record import Record
from eagle.store.writer import ShardWriter
from eagle.target.features import HIDDEN_STATE


def ahead_of(cards: int) -> int:
    """Batches that may be on their way while the next one is started, so that all cards of a worker have one.

    One card is busy while a second batch waits; it has a third, for the time that a batch takes to be started.
    """
    return max(2, cards)


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


class Collector:
    """Takes one batch after the other and closes a shard behind any; one thread only touches `progress`.

    batches, shards: how many batches come and how many shards they have to become; None: as many as they fill. cards:
    that compute them, one after the other. in_sequence: whether a shard's records follow those of the shard before it
    in the worker's share, so that it may say how far that share is.

    Its methods raise what went wrong with the batches before: WorkError, OSError.
    """

    def __init__(
        self,
        writer: ShardWriter,
        progress: Progress,
        dtype: str,
        batches: int = 0,
        shards: int | None = None,
        *,
        cards: int = 1,
        in_sequence: bool = True,
    ) -> None:
        self.writer, self.progress, self.dtype = writer, progress, dtype
        self._batches, self._shards, self._in_sequence = batches, shards, in_sequence
        self._ahead = ahead_of(cards)
        # One more than may wait, for the batch that is being handed over.
        self._copies = HostCopies(self._ahead + 1)
        self._pool = ThreadPoolExecutor(1, "collector")
        self._pending: deque[Future[None]] = deque()
        self._failure: BaseException | None = None

    def add(self, features: dict[str, torch.Tensor], items: list[Item]) -> None:
        """Features of a batch by name, ``[B, T, W]`` each, on the device and perhaps still being computed."""
        if all(tensor.device.type == "cpu" for tensor in features.values()):  # nothing to wait for
            self._remembering(lambda: self._store(features, all_finite(features), items))
        else:
            copy = self._copies.start(features)
            self._submit(lambda: self._fetch(copy, items))

    def close(self) -> None:
        """Write what is left and wait for it."""
        self._submit(self._close_shard)
        while self._pending:
            self._pending.popleft().result()
        self.writer.wait()
        self._pool.shutdown()

    def _submit(self, work: Callable[[], None]) -> None:
        self._pending.append(self._pool.submit(self._remembering, work))
        while len(self._pending) > self._ahead:
            self._pending.popleft().result()

    def _remembering(self, work: Callable[[], None]) -> None:
        """Do it and remember the first failure, by which all that comes behind it fails too.

        Batches that are queued by then are still fetched, also by the interpreter as it ends, and give their buffers
        back; stored, they would make a shard that says the failed one is done.
        """
        try:
            work()
        except BaseException as error:
            self._failure = self._failure or error
            raise

    def _check(self) -> None:
        if self._failure:
            raise self._failure

    def _fetch(self, copy: HostCopy, items: list[Item]) -> None:
        with copy as (features, finite):
            self._store(features, finite, items, is_lent=True)

    def _store(
        self, features: dict[str, torch.Tensor], finite: torch.Tensor, items: list[Item], *, is_lent: bool = False
    ) -> None:
        """is_lent: whether the features' memory is another batch's as soon as this returns."""
        self._check()
        check_finite(finite, items, self.dtype)
        for row, item in enumerate(items):
            length = len(item.encoded.input_ids)
            ids, mask = torch.from_numpy(item.encoded.input_ids), torch.from_numpy(item.encoded.loss_mask)
            own = {name: tensor[row, :length] for name, tensor in features.items()}
            if is_lent:
                own = {name: tensor.clone() for name, tensor in own.items()}
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
        self._check()
        self.writer.close_shard(json.dumps(self.progress.to_json() if self._in_sequence else {}))
