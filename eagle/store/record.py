"""One conversation's features, as they are read and as they lie on disk."""

from __future__ import annotations

import zlib
from dataclasses import dataclass, field
from pathlib import Path
from typing import Protocol

import numpy as np
import torch

from eagle.store.dtypes import SAME, Packed, pack

#: The features that every record holds: a draft of any family is trained towards what they say of the next token.
HIDDEN_STATE = "hidden_state"


@dataclass(frozen=True, slots=True)
class Record:
    """One conversation's features.

    input_ids: ``[T]`` int32. loss_mask: ``[T]`` uint8, unshifted. hidden_state: ``[T, H]``, row t is the target's
    last hidden state after its final norm at token t. conversation: its index in the data file; further rows of one
    conversation have that and a multiple of the number of records in the file. more: other features by name,
    ``[T, W]`` each, where the draft family reads any.
    """

    conversation: int
    input_ids: torch.Tensor
    loss_mask: torch.Tensor
    hidden_state: torch.Tensor
    more: dict[str, torch.Tensor] = field(default_factory=dict)

    def __len__(self) -> int:
        return len(self.input_ids)

    def features(self) -> dict[str, torch.Tensor]:
        """All features by name, ``[T, W]`` each."""
        return {HIDDEN_STATE: self.hidden_state, **self.more}

    def cut(self, end: int) -> Record:
        """The first `end` tokens."""
        more = {name: tensor[:end] for name, tensor in self.more.items()}
        return Record(self.conversation, self.input_ids[:end], self.loss_mask[:end], self.hidden_state[:end], more)

    def crc32(self) -> int:
        """A checksum over everything the record holds."""
        return self.stored().crc32()

    def stored(self, store_dtype: str = SAME) -> StoredRecord:
        """This record as a shard of that store dtype holds it."""
        features = {name: pack(tensor, store_dtype) for name, tensor in self.features().items()}
        return StoredRecord(self.conversation, self.input_ids, self.loss_mask, features)


@dataclass(frozen=True, slots=True)
class StoredRecord:
    """A record as it lies on disk: its features, by name, perhaps scaled. Copied between shards without a change.

    checked: its checksum, where it was read from a shard and found to match.
    """

    conversation: int
    input_ids: torch.Tensor
    loss_mask: torch.Tensor
    features: dict[str, Packed]
    checked: int | None = None

    def __len__(self) -> int:
        return len(self.input_ids)

    @property
    def nbytes(self) -> int:
        return self.input_ids.nbytes + self.loss_mask.nbytes + self.feature_bytes

    @property
    def feature_bytes(self) -> int:
        return sum(packed.nbytes for packed in self.features.values())

    def crc32(self) -> int:
        """A checksum over everything the record holds, as it is stored."""
        packed = [tensor for packed in self.features.values() for tensor in packed.tensors()]
        tensors = (self.input_ids, self.loss_mask, *packed)
        return checksum(*(tensor.contiguous().view(torch.uint8).numpy() for tensor in tensors))

    def read(self) -> Record:
        """The record with its features in the dtype the target computed them in."""
        features = {name: packed.unpack() for name, packed in self.features.items()}
        return Record(self.conversation, self.input_ids, self.loss_mask, features.pop(HIDDEN_STATE), features)


def checksum(*arrays: np.ndarray) -> int:
    crc = 0
    for array in arrays:
        crc = zlib.crc32(array, crc)
    return crc


class RecordSource(Protocol):
    """Something that holds records by position: a `Shard` or a folder of classic dumps."""

    path: Path
    files: list[Path]
    conversations: np.ndarray
    lengths: np.ndarray

    widths: dict[str, int]
    dtype_code: str
    stored_code: str

    def __len__(self) -> int: ...
    def read(self, position: int, *, features: bool = True) -> Record: ...
    def leave_out(self, positions: list[int]) -> None: ...
