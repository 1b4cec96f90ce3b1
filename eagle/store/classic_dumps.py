"""The dumps of the public EAGLE scripts: ``<folder>/data_<n>.ckpt``, one pickled dict a conversation.

Each is a ``torch.save`` of ``input_ids [T]``, ``loss_mask [T]`` and ``hidden_state [T, H]``. They are read with
``weights_only=True``, memory-mapped where the file allows it, and can be trained on and resharded like a store. No dump
stays open or mapped behind what reads it: a folder may hold more of them than a process may have memory maps.
"""

from __future__ import annotations

import errno
import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch

from eagle.errors import RequestError
from eagle.store.damage import Damaged, Replaced, exhausted
from eagle.store.record import Record, StoredRecord, supervised_counts, token_counts, token_key
from eagle.target.features import HIDDEN_STATE
from eagle.tensor_file import DTYPE_CODES

_DUMP_NAME = re.compile(r"data_(\d+)\.ckpt")
_KEYS = ("input_ids", "loss_mask", HIDDEN_STATE)

#: How many records' masks are unpacked at a time.
_UNPACKED = 1024


def is_dump_name(name: str) -> bool:
    return _DUMP_NAME.fullmatch(name) is not None


class Head(NamedTuple):
    """What is kept of a dump. mask: its loss mask, eight positions a byte."""

    length: int
    hidden_size: int
    dtype: torch.dtype
    mask: bytes


def read_head(file: Path) -> Head:
    """Raises: Damaged (a WorkError), Exhausted where the machine lacks something, OSError."""
    content = _load(file)
    hidden = content[HIDDEN_STATE]
    mask = np.packbits(content["loss_mask"].numpy() != 0).tobytes()
    return Head(len(hidden), int(hidden.shape[1]), hidden.dtype, mask)


class ClassicFolder:
    """The dumps of one folder as a record source; the number in a file's name stands for the conversation.

    heads: of its files, see `read_head`.

    Raises: RequestError for dumps of different targets.
    """

    def __init__(self, path: Path, heads: Mapping[Path, Head]) -> None:
        self.path = path
        self.files = sorted(heads, key=_number)
        self.conversations = np.array([_number(file) for file in self.files], dtype=np.int64)
        own = [heads[file] for file in self.files]
        self.lengths = np.array([head.length for head in own], dtype=np.int64)
        self._masks = [head.mask for head in own]
        first = own[0]
        self.widths = {HIDDEN_STATE: first.hidden_size}
        self.dtype_code = self.stored_code = DTYPE_CODES.get(first.dtype, str(first.dtype))
        for file, head in zip(self.files, own, strict=True):
            if (head.hidden_size, head.dtype) != (first.hidden_size, first.dtype):
                raise RequestError(
                    f"{file} holds hidden states of size {head.hidden_size} ({head.dtype}), the dumps beside it "
                    f"{first.hidden_size} ({first.dtype}). Dumps of different targets cannot be mixed."
                )

    def __len__(self) -> int:
        return len(self.files)

    def place(self, position: int) -> tuple[Path, int]:
        """The file of that record, and its position in it."""
        return self.files[position], 0

    def leave_out(self, positions: Sequence[int]) -> None:
        """Forget these records; the ones behind them move up."""
        gone = set(positions)
        kept = [position for position in range(len(self)) if position not in gone]
        self.files, self._masks = [self.files[at] for at in kept], [self._masks[at] for at in kept]
        self.conversations, self.lengths = self.conversations[kept], self.lengths[kept]

    def supervised(self, max_len: int | None = None) -> np.ndarray:
        """How many positions of every record are trained on: see `supervised_counts`."""
        counts = [np.zeros(0, dtype=np.int64)]
        for start in range(0, len(self), _UNPACKED):
            lengths = self.lengths[start : start + _UNPACKED]
            masks = [
                np.unpackbits(np.frombuffer(mask, dtype=np.uint8), count=int(length))
                for mask, length in zip(self._masks[start : start + _UNPACKED], lengths, strict=True)
            ]
            offsets = np.cumsum([0, *lengths], dtype=np.int64)
            counts.append(supervised_counts(np.concatenate(masks), offsets, max_len))
        return np.concatenate(counts)

    def token_counts(self, size: int, max_len: int | None = None) -> np.ndarray:
        """How often each token is supervised: see `eagle.store.record.token_counts`."""
        counts = np.zeros(size, dtype=np.int64)
        for position in range(len(self)):
            record = self.read(position, features=False)
            counts += token_counts(record.input_ids.numpy()[:max_len], record.loss_mask.numpy()[:max_len], size)
        return counts

    def token_keys(self, positions: Sequence[int], max_len: int | None = None) -> list[int]:
        """Of these records: see `eagle.store.record.token_key`."""
        return [token_key(self.read(position, features=False).input_ids.numpy()[:max_len]) for position in positions]

    def read(self, position: int, *, features: bool = True) -> Record:
        """Raises: Damaged, Exhausted, Replaced, OSError."""
        try:
            content = _load(self.files[position])
        except FileNotFoundError as error:
            raise Replaced(self.files[position]) from error
        hidden = content[HIDDEN_STATE]
        if len(hidden) != self.lengths[position]:
            raise Replaced(self.files[position])
        try:  # copies, all of them: what is left of a mapping would keep all of it
            return Record(
                int(self.conversations[position]),
                content["input_ids"].to(torch.int32, copy=True),
                content["loss_mask"].to(torch.uint8, copy=True),
                hidden.clone() if features else hidden.new_empty(0, hidden.shape[1]),
            )
        except (MemoryError, RuntimeError) as error:
            if found := exhausted(error, self.files[position]):
                raise found from error
            raise

    def stored(self, position: int) -> StoredRecord:
        """The same, as a shard would hold it."""
        return self.read(position).stored()


def _number(file: Path) -> int:
    match = _DUMP_NAME.fullmatch(file.name)
    assert match
    return int(match[1])


def _load(file: Path) -> dict[str, torch.Tensor]:
    try:
        try:
            content = torch.load(str(file), map_location="cpu", mmap=True, weights_only=True)
        except RuntimeError:  # the format of torch before 1.6 cannot be memory-mapped
            content = torch.load(file, map_location="cpu", weights_only=True)
    except Exception as error:  # pickle raises anything on a damaged or unsafe file
        if found := exhausted(error, file):
            raise found from error
        if isinstance(error, OSError) and error.errno not in (None, errno.EIO):
            raise  # it is not there any more, may not be read, ...
        raise Damaged(
            f"{file} cannot be read: {error}. It is damaged, or not a plain dump of {', '.join(_KEYS)}. "
            "Delete it to go on without it."
        ) from error
    missing = [key for key in _KEYS if not isinstance(content, dict) or key not in content]
    if missing:
        raise Damaged(f"{file} has no {', '.join(missing)}; a dump holds {', '.join(_KEYS)}. Delete it to go on.")
    tensors = {key: torch.as_tensor(content[key]) for key in _KEYS}
    # Some forks keep the batch dimension of 1.
    tensors = {key: t.squeeze(0) if t.dim() == (3 if key == HIDDEN_STATE else 2) else t for key, t in tensors.items()}
    wrong = {key: list(t.shape) for key, t in tensors.items() if t.dim() != (2 if key == HIDDEN_STATE else 1)}
    if wrong:
        raise Damaged(f"{file} holds {wrong}; expected one row, and [T, H] of {HIDDEN_STATE}. Delete it to go on.")
    lengths = {key: len(tensor) for key, tensor in tensors.items()}
    if len(set(lengths.values())) > 1:
        raise Damaged(f"{file} is inconsistent: lengths {lengths} should be equal. Delete it to go on.")
    return tensors
