"""Sequences of token ids in one row without padding; a beginning that most of them share stands there once.

A causal model computes the same for the same beginning, so the system prompt that a chat template puts before every
conversation need not be computed for each.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

#: Key lengths in attention are multiples of this: rows of scores that are not take longer.
KEY_STEP = 32
#: Of a batch's tokens, the least that sharing a beginning has to save.
_WORTH = 0.02


@dataclass(frozen=True, slots=True)
class Group:
    """Sequences that attend alike: each to itself, from one position on.

    keys: ``[B, T]``, where in the row position t of a sequence stands; T is a multiple of `KEY_STEP`. Beyond a
    sequence's end stands its own last place: attention multiplies what it masks by 0, which a NaN of another sequence
    would survive. first: the first position that attends. rows: what of the row is the group's own. own: for each of
    them its place among the group's queries ``[B * (T - first)]``.
    """

    keys: np.ndarray
    first: int
    rows: slice
    own: np.ndarray


@dataclass(frozen=True, slots=True)
class Packed:
    """ids, positions: ``[N]``, of every place in the row. places: ``[B, longest]``, where position t of a sequence
    stands; 0 beyond its end. groups: together they cover the row.
    """

    ids: np.ndarray
    positions: np.ndarray
    places: np.ndarray
    groups: list[Group]


def pack(sequences: Sequence[np.ndarray]) -> Packed:
    """One row of all sequences, none of which is empty."""
    length, sharing = shared_beginning(sequences)
    places = np.zeros((len(sequences), max(map(len, sequences))), dtype=np.int64)
    ids, positions, groups, end = [], [], [], 0
    if length:
        ids.append(sequences[sharing[0]][:length])
        positions.append(np.arange(length))
        places[sharing, :length] = positions[0]
        groups.append(_group(positions[0][None], np.array([length]), 0, slice(0, length)))
        end = length
    others = sorted(set(range(len(sequences))) - set(sharing))
    for members, first in ((sharing, length), (others, 0)):
        if not members:
            continue
        start = end
        for member in members:
            sequence = sequences[member]
            own = np.arange(first, len(sequence))
            ids.append(sequence[first:])
            positions.append(own)
            places[member, first : len(sequence)] = own + (end - first)
            end += len(own)
        lengths = np.array([len(sequences[member]) for member in members])
        groups.append(_group(places[members, : lengths.max()], lengths, first, slice(start, end)))
    return Packed(np.concatenate(ids).astype(np.int64), np.concatenate(positions), places, groups)


def _group(places: np.ndarray, lengths: np.ndarray, first: int, rows: slice) -> Group:
    longest = -(-places.shape[1] // KEY_STEP) * KEY_STEP
    keys = np.take_along_axis(places, np.minimum(np.arange(longest), lengths[:, None] - 1), axis=1)
    own = np.concatenate([number * (longest - first) + np.arange(n - first) for number, n in enumerate(lengths)])
    return Group(keys, first, rows, own)


def shared_beginning(sequences: Sequence[np.ndarray]) -> tuple[int, list[int]]:
    """How many first tokens which of the sequences share, so that sharing saves most; 0 and none where it saves little.

    Every sequence that shares keeps a token of its own.
    """
    # A beginning that most share is that of the one in the middle when they are sorted.
    middle = sorted(sequence.tolist() for sequence in sequences)[len(sequences) // 2]
    common = np.array([_common(sequence, np.array(middle)) for sequence in sequences])
    saved = {int(length): int(length) * (int((common >= length).sum()) - 1) for length in set(common.tolist())}
    best = max(saved, key=lambda length: (saved[length], length))
    if saved[best] <= _WORTH * sum(map(len, sequences)):
        return 0, []
    return best, np.flatnonzero(common >= best).tolist()


def _common(a: np.ndarray, b: np.ndarray) -> int:
    """Length of the common beginning, at most one less than either."""
    shorter = min(len(a), len(b)) - 1
    differs = np.flatnonzero(a[:shorter] != b[:shorter])
    return int(differs[0]) if len(differs) else shorter
