"""Records to training examples and batches: the split, the noise, the order."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Protocol

import numpy as np

from eagle.drafts.alignment import Example, StoredBatch, collate, shift
from eagle.errors import RequestError, WorkError
from eagle.store.record import Record, StoredRecord

#: Records sorted together by length, in global batches: enough to pad little, few enough to stay random.
BUCKET = 16


class RecordStore(Protocol):
    """What a data set reads from: an `eagle.store.reader.FeatureStore`, or the base model itself.

    lengths: ``[R]`` tokens of every record. groups: ``[R]``, the same number, from 0 on, for those of one conversation.
    widths: of the features it holds, by name.
    """

    lengths: np.ndarray
    groups: np.ndarray

    @property
    def widths(self) -> dict[str, int]: ...
    @property
    def tokens(self) -> int: ...
    def __len__(self) -> int: ...
    def __getitem__(self, index: int) -> Record: ...
    def stored(self, indices: Sequence[int]) -> list[StoredRecord]: ...
    def supervised(self, max_len: int | None = None) -> np.ndarray: ...
    def records_digest(self) -> str: ...
    def token_counts(self, size: int, max_len: int | None = None) -> np.ndarray: ...
    def token_keys(self, indices: np.ndarray, max_len: int | None = None) -> np.ndarray: ...
    def notes(self) -> list[str]: ...
    def identity(self) -> list[str]: ...


class FeatureDataset:
    """Examples by index, which counts within `indices` of the store, and batches of them.

    reads: the features that the draft reads, perhaps of fewer layers than the records hold. noise: half-width of the
    uniform noise added to them, in their own units. It depends on seed, epoch and record alone, so it is the same
    whatever process loads it. vocab_size: of the base model, whose token ids the records must hold; None: not checked.

    `example` and `batch` raise what reading a record raises, and WorkError for token ids outside of the vocabulary.
    """

    def __init__(
        self,
        store: RecordStore,
        indices: np.ndarray,
        max_len: int,
        reads: str,
        *,
        noise: float = 0.0,
        seed: int = 0,
        vocab_size: int | None = None,
    ) -> None:
        self.store, self.indices, self.max_len, self.reads = store, indices, max_len, reads
        self.noise, self.seed, self.vocab_size = noise, seed, vocab_size

    def __len__(self) -> int:
        return len(self.indices)

    @property
    def lengths(self) -> np.ndarray:
        return np.minimum(self.store.lengths[self.indices], self.max_len)

    def example(self, index: int) -> Example:
        """One record as the draft sees it, without noise."""
        (record,) = self._stored([int(self.indices[index])])
        return shift(record.read([self.reads]), self.reads)

    def batch(self, epoch: int, indices: Sequence[int]) -> StoredBatch:
        """These records as one micro-batch of that epoch."""
        numbers = [int(self.indices[index]) for index in indices]
        records = self._stored(numbers)
        seeds = [hash((self.seed, epoch, number)) & (2**63 - 1) for number in numbers] if self.noise else []
        return collate(records, self.reads, seeds, self.noise)

    def _stored(self, numbers: Sequence[int]) -> list[StoredRecord]:
        """These records of the store, cut."""
        records = [record.cut(self.max_len) for record in self.store.stored(numbers)]
        if self.vocab_size is not None:
            for record in records:
                check_tokens(record, self.vocab_size)
        return records


def check_tokens(record: StoredRecord, vocab_size: int) -> None:
    """Raises: WorkError for a token id that an embedding ``[vocab_size, H]`` has no row for.

    Looked at here, on the host: a card says of it that an assertion failed, or computes with what is not there.
    """
    outside = record.input_ids[(record.input_ids < 0) | (record.input_ids >= vocab_size)]
    if len(outside):
        raise WorkError(
            f"Conversation {record.conversation} holds the token {int(outside[0])}, and the base model's vocabulary "
            f"has {vocab_size:,}, from 0 on: these features are of another model. Name the one that they were computed "
            "by (--basepath), or make a store of this one with allocation.py."
        )


def split_store(
    store: RecordStore, val_ratio: float, seed: int, usable: np.ndarray | None = None
) -> tuple[np.ndarray, np.ndarray]:
    """Indices of the training and the validation records: whole conversations, the same for every run.

    usable: indices of those that something can be learned from (default: all).
    """
    usable = np.arange(len(store)) if usable is None else usable
    groups = store.groups[usable]
    conversations = np.unique(groups)
    count = len(conversations)
    order = np.random.RandomState(seed).permutation(count)
    held_out = round(count * val_ratio) if val_ratio else 0
    if val_ratio and count > 1:
        held_out = min(max(held_out, 1), count - 1)
    is_held_out = np.isin(groups, conversations[order[:held_out]])
    return usable[~is_held_out], usable[is_held_out]


def keep_apart(
    store: RecordStore, train: np.ndarray, held_out: np.ndarray, max_len: int, *, leave_out: bool = True
) -> tuple[np.ndarray, list[str]]:
    """The training records but for those whose tokens within `max_len` are a validation record's, and notes on them.

    Files of conversations hold some more than once, under several numbers. Which are held out does not change by it.
    leave_out: otherwise they stay, and are counted. They also stay where all are such, as in a file that repeats one
    conversation to try something out.
    """
    lengths = np.minimum(store.lengths, max_len)
    alike = train[np.isin(lengths[train], lengths[held_out])]
    keys = store.token_keys(np.concatenate([alike, held_out]), max_len)
    twins = alike[np.isin(keys[: len(alike)], keys[len(alike) :])]
    if not len(twins):
        return train, []
    found = f"{len(twins):,} of {len(train):,} training records have the same tokens as a validation record"
    if not leave_out:
        return train, [f"{found}: the run began with them and goes on with them"]
    if len(twins) == len(train):
        return train, [f"{found}, so that validation says nothing of other conversations"]
    return np.setdiff1d(train, twins), [f"{found} and are left out"]


def usable_records(store: RecordStore, max_len: int, where: str) -> tuple[np.ndarray, list[str]]:
    """Indices of the records with a supervised position within `max_len`, and notes on the others.

    where: the flag and the value that name the records.

    Raises: RequestError where there is none: why, and what helps.
    """
    counts = store.supervised(max_len)
    usable = np.flatnonzero(counts)
    left = len(counts) - len(usable)
    if not left:
        return usable, []
    never = int((store.supervised() == 0).sum())
    later = left - never
    if not len(usable):
        if later:
            raise RequestError(
                f"{where}: no position of its {len(counts):,} records is supervised within --max_len {max_len} tokens: "
                f"the replies of {later:,} come later. Raise --max_len."
            )
        raise RequestError(
            f"{where}: nothing is supervised in its {len(counts):,} records: no loss_mask has two tokens of a reply in "
            "a row. A draft learns from replies only; expected 1 in the loss_mask where a token belongs to one. Make "
            "the records again from conversations with replies (python -m eagle.data.viewer shows what is supervised)."
        )
    notes = []
    if never:
        notes.append(f"{never:,} of {len(counts):,} records have no supervised position and are left out")
    if later:
        notes.append(
            f"{later:,} of {len(counts):,} records have no supervised position within --max_len {max_len} and are left "
            "out"
        )
    return usable, notes


def epoch_batches(lengths: np.ndarray, global_size: int, seed: int, epoch: int) -> list[np.ndarray]:
    """The global batches of one epoch: every index once, similar lengths together, batches in random order.

    They depend on seed and epoch, not on how a global batch is dealt out to processes and micro-batches.
    """
    random = np.random.RandomState((seed * 1_000_003 + epoch) % 2**32)
    order = random.permutation(len(lengths))
    window = global_size * BUCKET
    batches = []
    for start in range(0, len(order), window):
        bucket = order[start : start + window]
        bucket = bucket[np.argsort(-lengths[bucket], kind="stable")]
        batches += [bucket[at : at + global_size] for at in range(0, len(bucket), global_size)]
    return [batches[i] for i in random.permutation(len(batches))]


def validation_order(lengths: np.ndarray, size: int) -> list[np.ndarray]:
    """Every index once in micro-batches of similar lengths, the longest first, where memory runs out if it does."""
    order = np.argsort(-lengths, kind="stable")
    return [order[at : at + size] for at in range(0, len(order), size)]


def micro_batches(batch: np.ndarray, size: int, rank: int, processes: int, accumulation: int) -> list[np.ndarray]:
    """A process's `accumulation` micro-batches of one global batch; some are empty where records run out."""
    pieces = [batch[at : at + size] for at in range(0, len(batch), size)]
    pieces += [batch[:0]] * (processes * accumulation - len(pieces))
    return pieces[rank::processes]
