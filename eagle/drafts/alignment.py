"""The one shift: what a draft reads and is trained on at every position. No other file shifts anything."""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass

import torch

from eagle.store.record import Record


@dataclass(frozen=True, slots=True)
class Example:
    """A conversation as the draft sees it, ``T-1`` positions long.

    At position t: tokens ``x[t+1]``, features what the draft reads of the target at t (with noise when training),
    targets the target's last hidden state ``f[t+1]``, which says what ``x[t+2]`` should be; supervised is True where
    ``x[t+1]`` and ``x[t+2]`` are both the assistant's. conversation: the record's, to name it.
    """

    tokens: torch.Tensor
    features: torch.Tensor
    targets: torch.Tensor
    supervised: torch.Tensor
    conversation: int


@dataclass(frozen=True, slots=True)
class Batch:
    """Examples padded on the right.

    tokens ``[B, T]``, features ``[B, T, W]``, targets ``[B, T, H]``, supervised ``[B, T]``, conversations ``[B]``.
    """

    tokens: torch.Tensor
    features: torch.Tensor
    targets: torch.Tensor
    supervised: torch.Tensor
    conversations: torch.Tensor

    def to(self, device: torch.device, dtype: torch.dtype) -> Batch:
        """This batch on `device`, what the draft reads in `dtype`; the targets keep the store's."""
        moved = Batch(*(getattr(self, name).to(device, non_blocking=True) for name in self.__slots__))
        return dataclasses.replace(moved, features=moved.features.to(dtype))

    def not_finite(self) -> list[int]:
        """The conversations whose features are not finite where they count."""
        counts = self.supervised[..., None]
        features, targets = (
            (tensor.isfinite() | ~counts).flatten(1).all(1) for tensor in (self.features, self.targets)
        )
        return self.conversations[~(features & targets)].tolist()

    def pin_memory(self) -> Batch:
        """In page-locked memory, from which a card copies by itself; the data loader calls this."""
        return Batch(*(getattr(self, name).pin_memory() for name in self.__slots__))


def named(conversations: list[int]) -> str:
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
    """The alignment of EAGLE (arXiv 2401.15077, section 4.1), for one record. reads: the features the draft reads."""
    return Example(
        tokens=record.input_ids[1:].long(),
        features=record.features()[reads][:-1],
        targets=record.hidden_state[1:],
        supervised=supervised_positions(record.loss_mask),
        conversation=record.conversation,
    )


def collate(examples: list[Example]) -> Batch:
    """Pad on the right, where causal attention never looks."""

    def pad(name: str) -> torch.Tensor:
        return torch.nn.utils.rnn.pad_sequence([getattr(e, name) for e in examples], batch_first=True)

    padded = {name: pad(name) for name in ("tokens", "features", "targets", "supervised")}
    return Batch(**padded, conversations=torch.tensor([example.conversation for example in examples]))
