"""One conversation's features, as they are read and as they lie on disk."""

from __future__ import annotations

import hashlib
import re
import zlib
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Protocol

import numpy as np
import torch

from eagle.store.dtypes import SAME, Packed, pack
from eagle.target.features import HIDDEN_STATE, holder_of, states_among, states_in

#: What a file of records calls its other tensors (see `eagle.store.shard`).
RESERVED = (HIDDEN_STATE, "scale", "input_ids", "loss_mask", "offsets", "conversation", "crc32")
_FEATURE_NAME = re.compile(r"[a-z][a-z0-9_]*")


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

    def __post_init__(self) -> None:
        odd = [name for name in self.more if not _FEATURE_NAME.fullmatch(name) or name in RESERVED]
        assert not odd, f"{odd} cannot name features: a store has other uses for such names"

    def __len__(self) -> int:
        return len(self.input_ids)

    def features(self) -> dict[str, torch.Tensor]:
        """All features by name, ``[T, W]`` each, always in the same order."""
        return {HIDDEN_STATE: self.hidden_state, **dict(sorted(self.more.items()))}

    def feature(self, name: str) -> torch.Tensor:
        """The features of that name ``[T, W]``, which may be the inputs of some of the layers it holds."""
        return _found(name, {own: Packed(tensor, None, tensor.dtype) for own, tensor in self.features().items()}).values

    def cut(self, end: int) -> Record:
        """The first `end` tokens."""
        more = {name: tensor[:end] for name, tensor in self.more.items()}
        return Record(self.conversation, self.input_ids[:end], self.loss_mask[:end], self.hidden_state[:end], more)

    def crc32(self) -> int:
        """A checksum over everything the record holds."""
        return self.stored().crc32()

    def stored(self, store_dtype: str = SAME) -> StoredRecord:
        """This record as a shard of that store dtype holds it."""
        features = {name: pack(tensor, store_dtype, states_in(name)) for name, tensor in self.features().items()}
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

    def feature(self, name: str) -> Packed:
        """The features of that name, which may be the inputs of some of the layers it holds."""
        return _found(name, self.features)

    def cut(self, end: int) -> StoredRecord:
        """The first `end` tokens."""
        if end >= len(self):
            return self
        features = {name: packed.cut(end) for name, packed in self.features.items()}
        return StoredRecord(self.conversation, self.input_ids[:end], self.loss_mask[:end], features)

    def crc32(self) -> int:
        """A checksum over everything the record holds, as it is stored."""
        packed = [tensor for packed in self.features.values() for tensor in packed.tensors()]
        tensors = (self.input_ids, self.loss_mask, *packed)
        return checksum(*(tensor.contiguous().view(torch.uint8).numpy() for tensor in tensors))

    def read(self, names: Iterable[str] | None = None) -> Record:
        """The record with its features in the dtype the target computed them in. names: of these and the last hidden
        states only, as in `feature`; default: all it holds."""
        chosen = self.features if names is None else dict.fromkeys((HIDDEN_STATE, *names))
        features = {name: self.feature(name).unpack() for name in chosen}
        return Record(self.conversation, self.input_ids, self.loss_mask, features.pop(HIDDEN_STATE), features)


def _found(name: str, features: dict[str, Packed]) -> Packed:
    holder = holder_of(name, features)
    assert holder is not None, f"a record of {', '.join(features)} has no {name}"
    found = features[holder]
    return found if holder == name else found.of_states(states_among(name, holder), states_in(holder))


def supervised_counts(loss_mask: np.ndarray, offsets: np.ndarray, max_len: int | None = None) -> np.ndarray:
    """How many positions of every record ``[R]`` a draft is trained on, within its first `max_len` tokens.

    loss_mask: ``[N]``, unshifted, of all records back to back; record r is ``offsets[r]:offsets[r+1]``. Position t
    counts where x[t+1] and x[t+2] both belong to a reply, as in `eagle.drafts.alignment`.
    """
    own = loss_mask != 0
    before = np.concatenate([[0], np.cumsum(own[:-1] & own[1:])])  # [i]: pairs that begin before i
    starts, ends = offsets[:-1], offsets[1:]
    if max_len is not None:
        ends = np.minimum(ends, starts + max_len)
    some = ends - starts > 2
    return np.where(some, before[np.where(some, ends - 1, 0)] - before[np.where(some, starts + 1, 0)], 0)


def token_counts(input_ids: np.ndarray, loss_mask: np.ndarray, size: int) -> np.ndarray:
    """How often each of `size` tokens belongs to a reply, ``[size]``; both arrays are ``[N]``."""
    own = input_ids[(loss_mask != 0) & (input_ids >= 0) & (input_ids < size)]
    return np.bincount(own, minlength=size)


def token_key(input_ids: np.ndarray) -> int:
    """A number of 64 bits for a row of tokens ``[T]``: equal rows have equal ones, in every process and on any day."""
    content = np.ascontiguousarray(input_ids, dtype="<i4")
    return int.from_bytes(hashlib.blake2b(content.data, digest_size=8).digest(), "little", signed=True)


def within(loss_mask: np.ndarray, offsets: np.ndarray, max_len: int | None) -> np.ndarray:
    """The loss masks ``[N]`` of records that begin at these offsets, 0 behind the first `max_len` tokens of each."""
    if max_len is None:
        return loss_mask
    places = np.arange(len(loss_mask)) - np.repeat(offsets[:-1], np.diff(offsets))
    return loss_mask * (places < max_len)


def digest_of(data: str, conversations: np.ndarray, lengths: np.ndarray) -> str:
    """Of records, by the data they are of, their conversations and how long each is ``[R]``."""
    digest = hashlib.sha256(data.encode())
    for array in (conversations, lengths):
        digest.update(np.asarray(array).astype("<i8").tobytes())
    return f"sha256 {digest.hexdigest()[:16]}"


def checksum(*arrays: np.ndarray) -> int:
    crc = 0
    for array in arrays:
        crc = zlib.crc32(array.data, crc)
    return crc


class RecordSource(Protocol):
    """Something that holds records by position: a `Shard` or a folder of classic dumps."""

    path: Path
    conversations: np.ndarray
    lengths: np.ndarray

    @property
    def files(self) -> list[Path]: ...
    @property
    def widths(self) -> dict[str, int]: ...
    @property
    def dtype_code(self) -> str: ...
    @property
    def stored_code(self) -> str: ...
    def __len__(self) -> int: ...
    def place(self, position: int) -> tuple[Path, int]:
        """The file of a record, and its position in that file, whatever was left out."""
        ...

    def read(self, position: int, *, features: bool = True) -> Record: ...
    def stored(self, position: int) -> StoredRecord: ...
    def supervised(self, max_len: int | None = None) -> np.ndarray:
        """See `supervised_counts`; of the records in their order."""
        ...

    def token_counts(self, size: int, max_len: int | None = None) -> np.ndarray: ...
    def token_keys(self, positions: Sequence[int], max_len: int | None = None) -> list[int]:
        """See `token_key`; of these records, cut to `max_len`, without reading their features."""
        ...

    def leave_out(self, positions: Sequence[int]) -> None: ...
