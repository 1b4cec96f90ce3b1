"""The dumps of the public EAGLE scripts: ``<folder>/data_<n>.ckpt``, one pickled dict a conversation.

Each is a ``torch.save`` of ``input_ids [T]``, ``loss_mask [T]`` and ``hidden_state [T, H]``. They are read with
``weights_only=True``, memory-mapped where the file allows it, and can be trained on and resharded like a store.
"""

from __future__ import annotations

import re
from pathlib import Path

import numpy as np
import torch

from eagle.errors import RequestError, WorkError
from eagle.store.record import Record, StoredRecord, supervised_counts
from eagle.target.features import HIDDEN_STATE
from eagle.tensor_file import DTYPE_CODES

_DUMP_NAME = re.compile(r"data_(\d+)\.ckpt")
_KEYS = ("input_ids", "loss_mask", HIDDEN_STATE)


def is_dump_name(name: str) -> bool:
    return _DUMP_NAME.fullmatch(name) is not None


class ClassicFolder:
    """The dumps of one folder as a record source; the number in a file's name stands for the conversation."""

    def __init__(self, path: Path, files: list[Path]) -> None:
        self.path = path
        self.files = files
        self.conversations = np.array([_number(file) for file in files], dtype=np.int64)
        shapes, self._masks = [], []
        for file in files:
            content = _load(file)
            shapes.append(content[HIDDEN_STATE])
            self._masks.append(content["loss_mask"].numpy() != 0)  # a copy: no mapping stays open for it
        self.lengths = np.array([len(hidden) for hidden in shapes], dtype=np.int64)
        hidden_size = int(shapes[0].shape[1])
        self.widths = {HIDDEN_STATE: hidden_size}
        self.dtype_code = self.stored_code = DTYPE_CODES.get(shapes[0].dtype, str(shapes[0].dtype))
        for file, hidden in zip(files, shapes, strict=True):
            if hidden.shape[1] != hidden_size or hidden.dtype != shapes[0].dtype:
                raise RequestError(
                    f"{file} holds hidden states of size {hidden.shape[1]} ({hidden.dtype}), the dumps beside it "
                    f"{hidden_size} ({shapes[0].dtype}). Dumps of different targets cannot be mixed."
                )

    def __len__(self) -> int:
        return len(self.files)

    def leave_out(self, positions: list[int]) -> None:
        """Forget these records; the ones behind them move up."""
        self.files = np.delete(np.array(self.files, dtype=object), positions).tolist()
        self.conversations = np.delete(self.conversations, positions)
        self.lengths = np.delete(self.lengths, positions)
        gone = set(positions)
        self._masks = [mask for position, mask in enumerate(self._masks) if position not in gone]

    def supervised(self, max_len: int | None = None) -> np.ndarray:
        """How many positions of every record are trained on: see `supervised_counts`."""
        offsets = np.cumsum([0, *self.lengths], dtype=np.int64)
        return supervised_counts(np.concatenate(self._masks), offsets, max_len)

    def read(self, position: int, *, features: bool = True) -> Record:
        """Raises: WorkError for a dump that is damaged."""
        content = _load(self.files[position])
        hidden = content[HIDDEN_STATE]
        return Record(
            int(self.conversations[position]),
            content["input_ids"].to(torch.int32),
            content["loss_mask"].to(torch.uint8),
            hidden.clone() if features else hidden[:0],
        )

    def stored(self, position: int) -> StoredRecord:
        """The same, as a shard would hold it."""
        return self.read(position).stored()


def find_classic_dumps(root: Path, damage: list[str] | None = None) -> list[ClassicFolder]:
    """One source for every folder below `root` that holds dumps, in a fixed order.

    damage: where given, dumps that cannot be read are left out, and what is wrong with them is added to it.

    Raises: WorkError for a damaged dump otherwise.
    """
    folders: dict[Path, list[Path]] = {}
    for file in root.rglob("data_*.ckpt"):
        if is_dump_name(file.name) and (damage is None or _is_whole(file, damage)):
            folders.setdefault(file.parent, []).append(file)
    return [ClassicFolder(folder, sorted(folders[folder], key=_number)) for folder in sorted(folders)]


def _is_whole(file: Path, damage: list[str]) -> bool:
    try:
        _load(file)
    except WorkError as error:
        damage.append(str(error))
        return False
    return True


def _number(file: Path) -> int:
    match = _DUMP_NAME.fullmatch(file.name)
    assert match
    return int(match[1])


def _load(file: Path) -> dict[str, torch.Tensor]:
    try:
        try:
            content = torch.load(file, map_location="cpu", mmap=True, weights_only=True)
        except RuntimeError:  # the format of torch before 1.6 cannot be memory-mapped
            content = torch.load(file, map_location="cpu", weights_only=True)
    except Exception as error:  # pickle raises anything on a damaged or unsafe file
        raise WorkError(
            f"{file} cannot be read: {error}. It is damaged, or not a plain dump of {', '.join(_KEYS)}. "
            "Delete it to go on without it."
        ) from error
    missing = [key for key in _KEYS if not isinstance(content, dict) or key not in content]
    if missing:
        raise WorkError(f"{file} has no {', '.join(missing)}; a dump holds {', '.join(_KEYS)}. Delete it to go on.")
    tensors = {key: torch.as_tensor(content[key]) for key in _KEYS}
    # Some forks keep the batch dimension of 1.
    tensors = {key: t.squeeze(0) if t.dim() == (3 if key == HIDDEN_STATE else 2) else t for key, t in tensors.items()}
    wrong = {key: list(t.shape) for key, t in tensors.items() if t.dim() != (2 if key == HIDDEN_STATE else 1)}
    if wrong:
        raise WorkError(f"{file} holds {wrong}; expected one row, and [T, H] of {HIDDEN_STATE}. Delete it to go on.")
    lengths = {key: len(tensor) for key, tensor in tensors.items()}
    if len(set(lengths.values())) > 1:
        raise WorkError(f"{file} is inconsistent: lengths {lengths} should be equal. Delete it to go on.")
    return tensors
