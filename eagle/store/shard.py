"""One file of a store: many records back to back in plain safetensors, written whole or not at all.

    hidden_state [N, H] store dtype    features, N the tokens of all its records
    scale        [N]    float32        only where the store dtype is int8 or float8: see `eagle.store.dtypes`
    <name>       [N, W] store dtype    more features, where a draft family reads others than the last hidden state,
    <name>.scale [N]    float32        and their scales
    input_ids    [N]    int32
    loss_mask    [N]    uint8          unshifted
    offsets      [R+1]  int64          record r is the rows offsets[r]:offsets[r+1]
    conversation [R]    int64          the index of the conversation in the data file
    crc32        [R]    int64          over the record's ids, mask, features and scales, as they are stored

A shard is written under a temporary name, synced and renamed, so a reader never sees a part of one.
"""

from __future__ import annotations

import re
import shutil
import zlib
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors import SafetensorError, safe_open

from eagle.errors import RequestError, WorkError
from eagle.files import fsync_folder
from eagle.store.dtypes import Packed
from eagle.store.record import Record, StoredRecord, checksum, supervised_counts
from eagle.target.features import HIDDEN_STATE
from eagle.tensor_file import DTYPE_CODES, write_pieces

#: Shards of scaled features say 2: a reader that knows nothing of scales must not take them for features. Those with
#: more features than the last hidden state say 3.
FORMAT_VERSION, SCALED_VERSION, WIDER_VERSION = 1, 2, 3
_SCALE = "scale"
_INDEX = ("input_ids", "loss_mask", "offsets", "conversation", "crc32")
_SHARD_NAME = re.compile(r"shard-(\d{5,})\.safetensors")


def write_shard(path: Path, records: list[Record] | list[StoredRecord], progress: str = "{}") -> None:
    """Write `records` as one finished shard at `path`."""
    stored = [record.stored() if isinstance(record, Record) else record for record in records]
    crcs = [record.crc32() if record.checked is None else record.checked for record in stored]
    index = {
        "offsets": np.cumsum([0, *map(len, stored)], dtype=np.int64),
        "conversation": np.array([record.conversation for record in stored], dtype=np.int64),
        "crc32": np.array(crcs, dtype=np.int64),
    }
    tensors = {
        "input_ids": [record.input_ids for record in stored],
        "loss_mask": [record.loss_mask for record in stored],
        **{name: [torch.from_numpy(array)] for name, array in index.items()},
    }
    metadata = {"format": str(FORMAT_VERSION), "progress": progress, "index_crc32": str(checksum(*index.values()))}
    metadata["progress_crc32"] = str(zlib.crc32(progress.encode()))
    names = list(stored[0].features)
    for name in names:
        packed = [record.features[name] for record in stored]
        tensors[name] = [one.values for one in packed]
        if packed[0].scale is not None:
            tensors[_scale_of(name)] = [one.scale for one in packed if one.scale is not None]
            metadata |= {"format": str(SCALED_VERSION), "dtype": str(packed[0].dtype).removeprefix("torch.")}
    if names != [HIDDEN_STATE]:
        metadata |= {"format": str(WIDER_VERSION), "features": " ".join(names)}
    temporary = path.with_name(f".{path.name}.tmp")
    try:
        write_pieces(temporary, tensors, metadata)
    except OSError as error:
        temporary.unlink(missing_ok=True)
        free = shutil.disk_usage(path.parent).free
        raise WorkError(
            f"Could not write {path} ({sum(record.nbytes for record in stored) / 1e6:,.0f} MB, "
            f"{free / 1e6:,.0f} MB free): {error}. Every shard finished before is kept; make room and run the "
            "same command again to continue."
        ) from error
    temporary.replace(path)
    fsync_folder(path.parent)


def shard_name(number: int) -> str:
    return f"shard-{number:05d}.safetensors"


def is_shard_name(name: str) -> bool:
    return _SHARD_NAME.fullmatch(name) is not None


def shard_number(path: Path) -> int:
    return int(path.name.removeprefix("shard-").removesuffix(".safetensors"))


def shard_paths(folder: Path) -> list[Path]:
    """The finished shards of one folder, in order."""
    return sorted((p for p in folder.glob("shard-*.safetensors") if is_shard_name(p.name)), key=shard_number)


def _damaged(path: Path, what: str, left_out: str = "it") -> str:
    return (
        f"{path} is damaged: {what}. Restore it from a copy, or delete it and run the same allocation.py command "
        f"again, which computes what is missing. --skip_damaged goes on without {left_out}."
    )


def _open_shard(path: Path) -> Any:
    try:
        file = safe_open(path, framework="pt", device="cpu")
    except (SafetensorError, OSError) as error:
        raise WorkError(_damaged(path, str(error))) from error
    version = (file.metadata() or {}).get("format")
    names = _feature_names(file)
    scales = {_scale_of(name) for name in names}
    expected = {*_INDEX, *names}
    known = version in (str(FORMAT_VERSION), str(SCALED_VERSION), str(WIDER_VERSION))
    if (version or "").isdigit() and not known:
        raise RequestError(
            f"{path} has store format {version!r}; this version reads the formats {FORMAT_VERSION} to {WIDER_VERSION}."
        )
    if not known or set(file.keys()) not in (expected, expected | scales):
        raise WorkError(_damaged(path, "its header names what no shard holds"))
    return file


def _scale_of(name: str) -> str:
    """The tensor that holds the scales of those features."""
    return _SCALE if name == HIDDEN_STATE else f"{name}.{_SCALE}"


def _feature_names(file: Any) -> list[str]:
    return (file.metadata() or {}).get("features", HIDDEN_STATE).split()


class Shard:
    """One finished shard, memory-mapped: a record is read when it is asked for, the index is kept.

    stored_code, dtype_code: how safetensors calls the dtype its features are stored and read in. widths: of its
    features, by name.

    Raises: WorkError for a damaged file, RequestError for one of another format.
    """

    def __init__(self, path: Path) -> None:
        self.path, self.files = path, [path]
        self._file: Any = None
        with _open_shard(path) as file:
            metadata = file.metadata()
            self.offsets = file.get_tensor("offsets").numpy()
            self.conversations = file.get_tensor("conversation").numpy()
            self._crc32 = file.get_tensor("crc32").numpy()
            slices = {name: file.get_slice(name) for name in _feature_names(file)}
            self.widths = {name: part.get_shape()[1] for name, part in slices.items()}
            rows = {part.get_shape()[0] for part in slices.values()}
            self.stored_code = slices[HIDDEN_STATE].get_dtype()
        name, index_crc32 = metadata.get("dtype"), metadata.get("index_crc32")
        self._progress, self._progress_crc32 = metadata.get("progress", ""), metadata.get("progress_crc32")
        self.scaled_from = getattr(torch, name) if name else None
        self.dtype_code = DTYPE_CODES[self.scaled_from] if self.scaled_from else self.stored_code
        self.lengths = np.diff(self.offsets)
        self._kept = np.arange(len(self.conversations))
        whole = len({len(self.conversations), len(self._crc32), len(self.lengths)}) == 1
        whole &= rows == {int(self.offsets[-1])}
        if index_crc32 is not None:  # shards of an earlier version have none
            whole &= str(checksum(self.offsets, self.conversations, self._crc32)) == index_crc32
        if not whole:
            raise WorkError(_damaged(path, f"its index does not fit its {max(rows):,} rows"))

    def __getstate__(self) -> dict[str, Any]:
        # A data-loader worker opens its own mapping; handles do not travel between processes.
        return {**self.__dict__, "_file": None}

    def __len__(self) -> int:
        return len(self.conversations)

    @property
    def tokens(self) -> int:
        return int(self.lengths.sum())

    @property
    def is_whole(self) -> bool:
        """Whether it still has every record of its file."""
        return len(self._kept) == len(self.offsets) - 1

    @property
    def progress(self) -> str:
        """What its writer said of its work. Raises: WorkError where the checksum does not match."""
        # Shards of an earlier version have none.
        if self._progress_crc32 not in (None, str(zlib.crc32(self._progress.encode()))):
            raise WorkError(_damaged(self.path, "the checksum of its progress does not match"))
        return self._progress

    def leave_out(self, positions: list[int]) -> None:
        """Forget these records; the ones behind them move up."""
        self._kept, self.conversations, self.lengths = (
            np.delete(array, positions) for array in (self._kept, self.conversations, self.lengths)
        )

    def supervised(self, max_len: int | None = None) -> np.ndarray:
        """How many positions of every record are trained on: see `supervised_counts`."""
        with _open_shard(self.path) as file:
            mask = file.get_tensor("loss_mask").numpy()
        return supervised_counts(mask, self.offsets, max_len)[self._kept]

    def read(self, position: int, *, features: bool = True) -> Record:
        """Record `position` of this shard; without `features` its hidden_state is empty ``[0, H]``.

        Raises: WorkError where the checksum does not match.
        """
        return self.stored(position, features=features).read()

    def stored(self, position: int, *, features: bool = True) -> StoredRecord:
        """The same record as it lies on disk."""
        if self._file is None:
            self._file = _open_shard(self.path)
        number = int(self._kept[position])
        start, end = int(self.offsets[number]), int(self.offsets[number + 1])
        last = end if features else start
        packed = {}
        for name in self.widths:
            values = self._file.get_slice(name)[start:last]
            scale = self._file.get_slice(_scale_of(name))[start:last] if self.scaled_from else None
            packed[name] = Packed(values, scale, self.scaled_from or values.dtype)
        conversation, expected = int(self.conversations[position]), int(self._crc32[number])
        ids, mask = (self._file.get_slice(name)[start:end] for name in ("input_ids", "loss_mask"))
        record = StoredRecord(conversation, ids, mask, packed, expected if features else None)
        if features and record.crc32() != expected:
            what = f"the checksum of record {number} (conversation {record.conversation}) does not match"
            raise WorkError(_damaged(self.path, what, "that record"))
        return record
