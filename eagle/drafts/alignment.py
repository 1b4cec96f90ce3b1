"""The one shift: what a draft reads and is trained on at every position. No other file shifts anything.

Records travel to the device as they are stored (`StoredBatch`), once: that the features of position t are the targets
of position t-1 is settled there, and so are the noise and the unpacking of one-byte features (`Batch`).
"""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from dataclasses import dataclass

import torch

from eagle.store.dtypes import Packed
from eagle.store.record import Record, StoredRecord
from eagle.streams import send
from eagle.target.features import HIDDEN_STATE


@dataclass(frozen=True, slots=True)
class Example:
    """A conversation as the draft sees it, ``T-1`` positions long.

    At position t: tokens ``x[t+1]``, features what the draft reads of the target at t, targets the target's last hidden
    state ``f[t+1]``, which says what ``x[t+2]`` should be; supervised is True where ``x[t+1]`` and ``x[t+2]`` are both
    the assistant's. conversation: the record's, to name it.
    """

    tokens: torch.Tensor
    features: torch.Tensor
    targets: torch.Tensor
    supervised: torch.Tensor
    conversation: int


@dataclass(frozen=True, slots=True)
class Batch:
    """What a draft is trained on, on its device: B examples padded on the right.

    tokens ``[B, T]`` int64 and features ``[B, T, W]`` (with noise, where there is any), as `Example` says. supervised
    ``[B, T]`` bool; of these N positions, places ``[N]``: which of the ``B * T`` they are; targets ``[N, H]``: theirs.
    """

    tokens: torch.Tensor
    features: torch.Tensor
    supervised: torch.Tensor
    places: torch.Tensor
    targets: torch.Tensor

    def at_places(self, values: torch.Tensor) -> torch.Tensor:
        """Those of ``[S, B, T, ...]`` at the supervised positions: ``[S, N, ...]``."""
        return values.flatten(1, 2)[:, self.places]


@dataclass(frozen=True, slots=True)
class StoredBatch:
    """B records padded on the right, as they are stored.

    tokens ``[B, T]`` int32, x[t+1] at position t. supervised ``[B, T]`` and places ``[N]`` as in `Batch`. features: by
    name, f[0..T-1] as ``[B, T, W]``: the target of the last supervised position is still among them. reads: the name of
    those that the draft reads. lengths: positions of every record. seeds, noise: of every record's noise and its
    half-width, 0 for none. conversations: the records', to name them.
    """

    tokens: torch.Tensor
    supervised: torch.Tensor
    places: torch.Tensor
    features: dict[str, Packed]
    reads: str
    lengths: tuple[int, ...]
    conversations: tuple[int, ...]
    seeds: tuple[int, ...] = ()
    noise: float = 0.0

    def tensors(self) -> list[torch.Tensor]:
        """What is sent."""
        packed = [tensor for features in self.features.values() for tensor in features.tensors()]
        return [self.tokens, self.supervised, self.places, *packed]

    @property
    def nbytes(self) -> int:
        return sum(tensor.nbytes for tensor in self.tensors())

    def with_tensors(self, tensors: Sequence[torch.Tensor]) -> StoredBatch:
        """The same with these in place of `tensors`: the same ones somewhere else."""
        tokens, supervised, places, *rest = tensors
        left = iter(rest)
        features = {
            name: Packed(next(left), None if packed.scale is None else next(left), packed.dtype)
            for name, packed in self.features.items()
        }
        return dataclasses.replace(self, tokens=tokens, supervised=supervised, places=places, features=features)

    def to(self, device: torch.device) -> StoredBatch:
        """There; from page-locked memory without waiting for it."""
        return self.with_tensors([send(tensor, device) for tensor in self.tensors()])

    def unsupervised(self) -> StoredBatch:
        """The same records, of which nothing counts."""
        nothing = torch.zeros_like(self.supervised)
        return dataclasses.replace(self, supervised=nothing, places=self.places[:0])

    def without_float8(self) -> StoredBatch:
        """Unpacked, where its features are float8, which NPUs do not have."""
        found = {
            name: Packed(unpacked(packed, self.lengths), None, packed.dtype)
            for name, packed in self.features.items()
            if str(packed.values.dtype).startswith("torch.float8")
        }
        return dataclasses.replace(self, features=self.features | found)

    def prepared(self, dtype: torch.dtype) -> Batch:
        """As the draft takes it, what it reads in `dtype`; computed where its tensors are."""
        # The target of a position is what is read one position later. No record's last position is supervised.
        targets = _rows(self.features[HIDDEN_STATE], self.places + 1)
        features = unpacked(self.features[self.reads], self.lengths)
        if self.noise:
            features = noisy(features, self.lengths, self.seeds, self.noise)
        return Batch(self.tokens.long(), features.to(dtype), self.supervised, self.places, targets)

    def not_finite(self) -> list[int]:
        """The conversations whose features are not finite where they count."""
        read = _rows(self.features[self.reads], self.places)
        targets = _rows(self.features[HIDDEN_STATE], self.places + 1)
        whole = [tensor.isfinite().all(-1) for tensor in (read, targets)]
        broken = ~(whole[0] & whole[1])
        rows = (self.places[broken] // self.tokens.shape[1]).unique().tolist()
        return [self.conversations[row] for row in rows]


def _rows(packed: Packed, places: torch.Tensor) -> torch.Tensor:
    """The features ``[N, W]`` at these of the ``B * T`` positions."""
    values = packed.values.flatten(0, 1)
    if packed.scale is None:
        return values[places]
    # As bytes: not every device can index float8.
    taken = values.view(torch.uint8)[places].view(values.dtype)
    return Packed(taken, packed.scale.flatten(0, 1)[places], packed.dtype).unpack()


def unpacked(packed: Packed, lengths: Sequence[int]) -> torch.Tensor:
    """Features ``[B, T, W]`` in the dtype the target computed them in, zero where padded.

    Record by record: what unpacking takes on top is of one record, not of the batch.
    """
    if packed.scale is None:
        return packed.values
    features = torch.zeros(packed.values.shape, dtype=packed.dtype, device=packed.values.device)
    for row, length in enumerate(lengths):
        own = Packed(packed.values[row, :length], packed.scale[row, :length], packed.dtype)
        features[row, :length] = own.unpack()
    return features


def noisy(features: torch.Tensor, lengths: Sequence[int], seeds: Sequence[int], noise: float) -> torch.Tensor:
    """A copy of ``[B, T, W]`` with uniform noise of half-width `noise`, in the features' own units.

    A record's noise depends on its seed alone (and on the kind of device that makes it), not on what it is batched
    with.
    """
    found = features.clone()
    generator = torch.Generator(features.device)
    for row, (length, seed) in enumerate(zip(lengths, seeds, strict=True)):
        generator.manual_seed(seed)
        own = features[row, :length]
        drawn = torch.rand(own.shape, generator=generator, dtype=torch.float32, device=own.device)
        found[row, :length] = drawn.sub_(0.5).mul_(2 * noise).add_(own).to(features.dtype)
    return found


def named(conversations: Sequence[int]) -> str:
    """Some of these conversations, for a message."""
    shown = ", ".join(map(str, conversations[:16])) + (", ..." if len(conversations) > 16 else "")
    return f"the conversations {shown} (on this process; others have others)"


def supervised_positions(loss_mask: torch.Tensor) -> torch.Tensor:
    """``[T]`` unshifted mask -> ``[T-1]`` bool, True where position t is trained."""
    own = loss_mask.bool()
    supervised = torch.zeros(len(own) - 1, dtype=torch.bool)
    # The last position predicts a token that is not there.
    supervised[:-1] = own[1:-1] & own[2:]
    return supervised


def shift(record: Record, reads: str) -> Example:
    """The alignment of EAGLE (arXiv 2401.15077, section 4.1), for one record.

    reads: the features the draft reads, which may be of fewer layers than the record holds.
    """
    return Example(
        tokens=record.input_ids[1:].long(),
        features=record.feature(reads)[:-1],
        targets=record.hidden_state[1:],
        supervised=supervised_positions(record.loss_mask),
        conversation=record.conversation,
    )


def collate(records: Sequence[StoredRecord], reads: str, seeds: Sequence[int] = (), noise: float = 0.0) -> StoredBatch:
    """Pad on the right, where causal attention never looks. reads: as in `shift`. seeds, noise: see `StoredBatch`."""
    lengths = tuple(len(record) - 1 for record in records)

    def room(like: torch.Tensor) -> torch.Tensor:
        return like.new_empty(len(records), max(lengths), *like.shape[1:])

    def put(part: torch.Tensor, padded: torch.Tensor, row: int) -> None:
        padded[row, : len(part)] = part
        padded[row, len(part) :].view(torch.uint8).zero_()  # not every torch fills float8

    def pad(parts: list[torch.Tensor]) -> torch.Tensor:
        padded = room(parts[0])
        for row, part in enumerate(parts):
            put(part, padded, row)
        return padded

    def pad_features(name: str) -> Packed:
        """Record by record: where a record holds more layers, these are a copy, which is not to live on."""
        first = records[0].feature(name)
        padded = Packed(room(first.values), None if first.scale is None else room(first.scale), first.dtype)
        for row, (record, length) in enumerate(zip(records, lengths, strict=True)):
            own = first if row == 0 else record.feature(name)
            for part, whole in zip(own.tensors(), padded.tensors(), strict=True):
                put(part[:length], whole, row)
        return padded

    supervised = pad([supervised_positions(record.loss_mask) for record in records])
    return StoredBatch(
        tokens=pad([record.input_ids[1:].int() for record in records]),
        supervised=supervised,
        places=supervised.flatten().nonzero().squeeze(-1),
        features={name: pad_features(name) for name in dict.fromkeys((HIDDEN_STATE, reads))},
        reads=reads,
        lengths=lengths,
        conversations=tuple(record.conversation for record in records),
        seeds=tuple(seeds),
        noise=noise,
    )
