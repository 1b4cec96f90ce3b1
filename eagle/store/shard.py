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
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Protocol

import numpy as np
import torch
from safetensors import SafetensorError, safe_open

from eagle.errors import RequestError, WorkError
from eagle.files import fsync_folder
from eagle.store.dtypes import SAME, Packed, pack
from eagle.tensor_file import DTYPE_CODES, write_pieces

#: Shards of scaled features say 2: a reader that knows nothing of scales must not take them for features. Those with
#: more features than the last hidden state say 3.
FORMAT_VERSION, SCALED_VERSION, WIDER_VERSION = 1, 2, 3
#: A shard is closed once it holds this much. Large enough that 68k conversations are a few thousand files,
#: small enough that a killed worker loses minutes, not hours.
SHARD_BYTES = 128 << 20

#: The features that every record holds: a draft of any family is trained towards what they say of the next token.
HIDDEN_STATE = "hidden_state"
_SCALE = "scale"
_INDEX = ("input_ids", "loss_mask", "offsets", "conversation", "crc32")
_SHARD_NAME = re.compile(r"shard-(\d{5,})\.safetensors")


@dataclass(frozen=True, slots=True)
class Record:
    """One conversation's features.

    input_ids: ``[T]`` int32. loss_mask: ``[T]`` uint8, unshifted. hidden_state: ``[T, H]``, row t is the target's
    last hidden state after its final norm at token t. conversation: its index in the data file. more: other features
    by name, ``[T, W]`` each, where the draft family reads any.
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
        return _crc32(*(tensor.contiguous().view(torch.uint8).numpy() for tensor in tensors))

    def read(self) -> Record:
        """The record with its features in the dtype the target computed them in."""
        features = {name: packed.unpack() for name, packed in self.features.items()}
        return Record(self.conversation, self.input_ids, self.loss_mask, features.pop(HIDDEN_STATE), features)


class ShardWriter:
    """Appends records to the numbered shards of one folder.

    Every finished shard carries `progress`, the caller's own JSON string, as it was when the shard was closed:
    a resumed caller reads it back from `Shard.progress`. The caller decides when a shard may be closed, since
    only it knows where its work can be taken up again.

    first: the number of the first shard; default: behind those that are there.

    background: write in a thread, one shard at a time; what goes wrong is raised by the next call or by `wait`.

    Raises: OSError (read-only), WorkError (disk full); what was finished before stays whole.
    """

    def __init__(
        self,
        folder: Path,
        *,
        shard_bytes: int = SHARD_BYTES,
        store_dtype: str = SAME,
        background: bool = False,
        first: int | None = None,
    ) -> None:
        self.folder = folder
        self.shard_bytes, self.store_dtype = shard_bytes, store_dtype
        self._pool = ThreadPoolExecutor(1, "writer") if background else None
        self._writing: Future[None] | None = None
        self._records: list[StoredRecord] = []
        self._bytes = 0
        folder.mkdir(parents=True, exist_ok=True)
        for leftover in folder.glob(".shard-*.tmp"):
            leftover.unlink()
        behind = max((shard_number(path) + 1 for path in shard_paths(folder)), default=0)
        self._next = behind if first is None else first

    def add(self, record: Record | StoredRecord) -> None:
        stored = record.stored(self.store_dtype) if isinstance(record, Record) else record
        self._records.append(stored)
        self._bytes += stored.feature_bytes

    @property
    def is_full(self) -> bool:
        return self._bytes >= self.shard_bytes

    def close_shard(self, progress: str = "{}") -> None:
        """Write the records gathered so far as one shard; none gathered, none written."""
        if not self._records:
            return
        self.wait()
        path, records = self.next_path(), self._records
        self._records, self._bytes = [], 0
        if self._pool:
            self._writing = self._pool.submit(write_shard, path, records, progress)
        else:
            write_shard(path, records, progress)

    def next_path(self) -> Path:
        """Where the next shard belongs, for a caller that has a whole one to put there."""
        self._next += 1
        return self.folder / shard_name(self._next - 1)

    def wait(self) -> None:
        """Until every closed shard is on the disk."""
        if self._writing:
            self._writing.result()
            self._writing = None


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
    metadata = {"format": str(FORMAT_VERSION), "progress": progress, "index_crc32": str(_crc32(*index.values()))}
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


def _crc32(*arrays: np.ndarray) -> int:
    crc = 0
    for array in arrays:
        crc = zlib.crc32(array, crc)
    return crc


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
    if not (version or "").isdigit() or set(file.keys()) not in (expected, expected | scales):
        raise WorkError(_damaged(path, "its header names what no shard holds"))
    if version not in (str(FORMAT_VERSION), str(SCALED_VERSION), str(WIDER_VERSION)):
        raise RequestError(
            f"{path} has store format {version!r}; this version reads the formats {FORMAT_VERSION} to {WIDER_VERSION}."
        )
    return file


def _scale_of(name: str) -> str:
    """The tensor that holds the scales of those features."""
    return _SCALE if name == HIDDEN_STATE else f"{name}.{_SCALE}"


def _feature_names(file: Any) -> list[str]:
    return (file.metadata() or {}).get("features", HIDDEN_STATE).split()


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
            whole &= str(_crc32(self.offsets, self.conversations, self._crc32)) == index_crc32
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
