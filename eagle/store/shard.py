"""One file of a store: many records back to back in plain safetensors, written whole or not at all.

    hidden_state [N, H] store dtype    features, N the tokens of all its records
    scale        [N]    float32        only where the store dtype is int8 or float8: see `eagle.store.dtypes`
    <name>       [N, W] store dtype    more features, where a draft family reads others than the last hidden state,
    <name>.scale [N]    float32        and their scales: [N, A] where the states of A layers stand side by side
    input_ids    [N]    int32
    loss_mask    [N]    uint8          unshifted
    offsets      [R+1]  int64          record r is the rows offsets[r]:offsets[r+1]
    conversation [R]    int64          the index of the conversation in the data file
    crc32        [R]    int64          over the record's ids, mask, features and scales, as they are stored

A shard is written under a temporary name, synced and renamed, so a reader never sees a part of one.
"""

from __future__ import annotations

import errno
import re
import shutil
import zlib
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from functools import cache
from pathlib import Path
from typing import BinaryIO, NamedTuple

import numpy as np
import torch

from eagle.errors import RequestError, WorkError
from eagle.files import fsync_folder
from eagle.store.damage import Damaged, Replaced, exhausted
from eagle.store.dtypes import Packed
from eagle.store.open_files import OPEN, Restamped, Span, Stamp, stamp_of
from eagle.store.record import Record, StoredRecord, checksum, supervised_counts, token_counts, token_key, within
from eagle.target.features import HIDDEN_STATE, states_in
from eagle.tensor_file import DTYPE_CODES, Entry, NotWhole, read_array, read_header, write_pieces

#: Shards of scaled features say 2: a reader that knows nothing of scales must not take them for features. Those with
#: more features than the last hidden state say 3.
FORMAT_VERSION, SCALED_VERSION, WIDER_VERSION = 1, 2, 3
_SCALE = "scale"
_ARRAYS = ("offsets", "conversation", "crc32")
_INDEX = {"input_ids": "I32", "loss_mask": "U8", **dict.fromkeys(_ARRAYS, "I64")}
#: What scaled features are read in, by the name that metadata give it; without one they are not scaled.
_NAMED = {"": None, "bfloat16": torch.bfloat16, "float16": torch.float16, "float32": torch.float32}
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
        "again, which computes what is missing (a resharded store is deleted whole and resharded again). "
        f"--skip_damaged goes on without {left_out}."
    )


_UNREADABLE = "the disk cannot read it (input/output error)"


@contextmanager
def _opened(path: Path) -> Iterator[BinaryIO]:
    """The file open for reading. What is wrong in it becomes Damaged, what the machine lacks Exhausted."""
    try:
        with path.open("rb") as file:
            yield file
    except NotWhole as error:
        raise Damaged(_damaged(path, str(error))) from error
    except (OSError, MemoryError) as error:
        if found := exhausted(error, path):
            raise found from error
        if isinstance(error, OSError) and error.errno == errno.EIO:
            raise Damaged(_damaged(path, _UNREADABLE)) from error
        raise


class _Layout(NamedTuple):
    """What the tensors of a shard are, the same for most shards of a store.

    dtypes: by name. widths: of the features, by name. scaled_from: what they are read in, where they are scaled.
    """

    dtypes: dict[str, torch.dtype]
    widths: dict[str, int]
    scaled_from: torch.dtype | None


@cache
def _layout(tensors: tuple[tuple[str, torch.dtype], ...], widths: tuple[tuple[str, int], ...], dtype: str) -> _Layout:
    """One object for all shards that are alike: a store has tens of thousands of them."""
    return _Layout(dict(tensors), dict(widths), _NAMED[dtype])


def _check_header(path: Path, entries: dict[str, Entry], metadata: dict[str, str]) -> tuple[str, ...]:
    """The names of the features. Raises: NotWhole, RequestError for another format."""
    version = metadata.get("format")
    known = version in (str(FORMAT_VERSION), str(SCALED_VERSION), str(WIDER_VERSION))
    if (version or "").isdigit() and not known:
        raise RequestError(
            f"{path} has store format {version!r}; this version reads the formats {FORMAT_VERSION} to {WIDER_VERSION}."
        )
    names = tuple(metadata.get("features", HIDDEN_STATE).split())
    expected, scales = {*_INDEX, *names}, {_scale_of(name) for name in names}
    if not known or HIDDEN_STATE not in names or set(entries) not in (expected, expected | scales):
        raise NotWhole("its header names what no shard holds")
    rows = {_scale_of(name): (states,) for name in names if (states := states_in(name)) > 1}
    sound = all(len(entries[name].shape) == 2 for name in names)
    sound &= all(entry.shape[1:] == rows.get(name, ()) for name, entry in entries.items() if name not in names)
    sound &= all(len(entry.shape) > 0 for entry in entries.values())
    sound &= all(entries[name].code == code for name, code in _INDEX.items())
    sound &= metadata.get("dtype", "") in _NAMED and ("dtype" in metadata) == (_scale_of(HIDDEN_STATE) in entries)
    if not sound:
        raise NotWhole("its header gives tensors a shape or a dtype that no shard has")
    return names


def _scale_of(name: str) -> str:
    """The tensor that holds the scales of those features."""
    return _SCALE if name == HIDDEN_STATE else f"{name}.{_SCALE}"


class Shard:
    """One finished shard: its index is read and kept, a record is read when it is asked for, nothing stays open.

    dtype_code, stored_code: how safetensors calls the dtype its features are read and stored in. widths: of its
    features, by name.

    Raises: Damaged (a WorkError), Exhausted where the machine lacks something, RequestError for another format.
    """

    __slots__ = (
        "_crc32", "_kept", "_layout", "_progress", "_progress_crc32", "_stamp", "_starts", "conversations", "lengths",
        "offsets", "path",
    )  # fmt: skip

    def __init__(self, path: Path) -> None:
        self.path = path
        with _opened(path) as file:
            entries, metadata = read_header(file)
            names = _check_header(path, entries, metadata)
            self._stamp = stamp_of(file)
            self.offsets, self.conversations, self._crc32 = (read_array(file, entries[name]) for name in _ARRAYS)
        tensors = tuple((name, entry.dtype) for name, entry in sorted(entries.items()) if name not in _ARRAYS)
        widths = tuple((name, entries[name].shape[1]) for name in names)
        self._layout = _layout(tensors, widths, metadata.get("dtype", ""))
        self._starts = {name: entry.start for name, entry in entries.items() if name not in _ARRAYS}
        self._progress, self._progress_crc32 = metadata.get("progress", ""), metadata.get("progress_crc32")
        self.lengths = np.diff(self.offsets)
        self._kept: np.ndarray | None = None
        rows = {entry.shape[0] for name, entry in entries.items() if name not in _ARRAYS}
        whole = len({len(self.conversations), len(self._crc32), len(self.lengths)}) == 1
        whole = whole and len(self.offsets) > 0 and rows == {int(self.offsets[-1])}
        if "index_crc32" in metadata:  # shards of an earlier version have none
            whole &= str(checksum(self.offsets, self.conversations, self._crc32)) == metadata["index_crc32"]
        if not whole:
            raise Damaged(_damaged(path, f"its index does not fit its {max(rows):,} rows"))

    @property
    def files(self) -> list[Path]:
        return [self.path]

    @property
    def widths(self) -> dict[str, int]:
        return self._layout.widths

    @property
    def stored_code(self) -> str:
        return DTYPE_CODES[self._layout.dtypes[HIDDEN_STATE]]

    @property
    def dtype_code(self) -> str:
        return DTYPE_CODES[self._layout.scaled_from or self._layout.dtypes[HIDDEN_STATE]]

    def __len__(self) -> int:
        return len(self.conversations)

    @property
    def tokens(self) -> int:
        return int(self.lengths.sum())

    @property
    def is_whole(self) -> bool:
        """Whether it still has every record of its file."""
        return self._kept is None

    @property
    def progress(self) -> str:
        """What its writer said of its work. Raises: Damaged where the checksum does not match."""
        # Shards of an earlier version have none.
        if self._progress_crc32 not in (None, str(zlib.crc32(self._progress.encode()))):
            raise Damaged(_damaged(self.path, "the checksum of its progress does not match"))
        return self._progress

    def place(self, position: int) -> tuple[Path, int]:
        """The file of that record, and its position in it, whatever was left out."""
        return self.path, self._number(position)

    def _number(self, position: int) -> int:
        return position if self._kept is None else int(self._kept[position])

    def leave_out(self, positions: Sequence[int]) -> None:
        """Forget these records; the ones behind them move up."""
        kept = np.arange(len(self)) if self._kept is None else self._kept
        self._kept, self.conversations, self.lengths = (
            np.delete(array, positions) for array in (kept, self.conversations, self.lengths)
        )

    def supervised(self, max_len: int | None = None) -> np.ndarray:
        """How many positions of every record are trained on: see `supervised_counts`."""
        (mask,) = self._read([self._span("loss_mask", 0, int(self.offsets[-1]))])
        counts = supervised_counts(mask.numpy(), self.offsets, max_len)
        return counts if self._kept is None else counts[self._kept]

    def token_counts(self, size: int, max_len: int | None = None) -> np.ndarray:
        """How often each token is supervised: see `eagle.store.record.token_counts`."""
        names = ("input_ids", "loss_mask")
        ids, mask = (
            part.numpy() for part in self._read([self._span(name, 0, int(self.offsets[-1])) for name in names])
        )
        if self._kept is not None:
            own = np.zeros(len(mask), dtype=bool)
            for number in self._kept:
                own[self.offsets[number] : self.offsets[number + 1]] = True
            mask = mask * own
        return token_counts(ids, within(mask, self.offsets, max_len), size)

    def token_keys(self, positions: Sequence[int], max_len: int | None = None) -> list[int]:
        """Of these records: see `eagle.store.record.token_key`."""
        starts = [int(self.offsets[self._number(position)]) for position in positions]
        ends = [start + int(self.lengths[position]) for start, position in zip(starts, positions, strict=True)]
        if max_len is not None:
            ends = [min(end, start + max_len) for start, end in zip(starts, ends, strict=True)]
        spans = [self._span("input_ids", start, end) for start, end in zip(starts, ends, strict=True)]
        return [token_key(ids.numpy()) for ids in self._read(spans)]

    def read(self, position: int, *, features: bool = True) -> Record:
        """Record `position` of this shard; without `features` its hidden_state is empty ``[0, H]``.

        Raises: Damaged where the checksum does not match, Exhausted, Replaced.
        """
        return self.stored(position, features=features).read()

    def stored(self, position: int, *, features: bool = True) -> StoredRecord:
        """The same record as it lies on disk."""
        number, scaled_from = self._number(position), self._layout.scaled_from
        start, end = int(self.offsets[number]), int(self.offsets[number + 1])
        last = end if features else start
        names = [*self.widths, *(map(_scale_of, self.widths) if scaled_from else ())]
        tokens = [self._span(name, start, end) for name in ("input_ids", "loss_mask")]
        ids, mask, *values = self._read([*tokens, *(self._span(name, start, last) for name in names)])
        found = dict(zip(names, values, strict=True))
        packed = {
            name: Packed(found[name], found.get(_scale_of(name)), scaled_from or found[name].dtype)
            for name in self.widths
        }
        conversation, expected = int(self.conversations[position]), int(self._crc32[number])
        record = StoredRecord(conversation, ids, mask, packed, expected if features else None)
        if features and record.crc32() != expected:
            what = f"the checksum of record {number} (conversation {record.conversation}) does not match"
            raise Damaged(_damaged(self.path, what, "that record"))
        return record

    def _span(self, name: str, start: int, end: int) -> Span:
        """Rows start..end of a tensor."""
        dtype, width = self._layout.dtypes[name], self.widths.get(name)
        if name.endswith(_SCALE) and (states := states_in(name.removesuffix(f".{_SCALE}"))) > 1:
            width = states
        at = self._starts[name] + start * dtype.itemsize * (1 if width is None else width)
        return Span(at, dtype, (end - start,) if width is None else (end - start, width))

    def _read(self, spans: list[Span]) -> list[torch.Tensor]:
        try:
            try:
                return OPEN.read(self.path, self._stamp, spans)
            except Restamped:
                self._stamp = self._same_content()
                return OPEN.read(self.path, self._stamp, spans)
        except (Restamped, FileNotFoundError) as error:
            raise Replaced(self.path) from error
        except OSError as error:
            if error.errno != errno.EIO:
                raise
            raise Damaged(_damaged(self.path, _UNREADABLE)) from error

    def _same_content(self) -> Stamp:
        """The stamp of the file that is there now. Raises: Replaced where it does not hold the same records; Damaged.

        Files are touched, so that nobody clears them away, and some network file systems number them anew.
        """
        now = Shard(self.path)
        same = (now._layout, now._starts) == (self._layout, self._starts)
        same = same and np.array_equal(now.offsets, self.offsets) and np.array_equal(now._crc32, self._crc32)
        kept = slice(None) if self._kept is None else self._kept
        if not same or not np.array_equal(now.conversations[kept], self.conversations):
            raise Replaced(self.path)
        return now._stamp
