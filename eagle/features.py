"""The store: features on disk, written by data generation, read by training.

    STORE/manifest.json            what made it: target, tokenizer, data, options, counts
    STORE/<i>/shard-00000.safetensors, shard-00001.safetensors, ...    finished data only
    STORE/<i>/done.json            worker i has finished its share: counts, dropped records
    STORE/<i>/worker.log           what worker i had to say

A shard is a plain safetensors file of many records back to back:

    hidden_state [N, H] store dtype    features, N the tokens of all its records
    input_ids    [N]    int32
    loss_mask    [N]    uint8          unshifted
    offsets      [R+1]  int64          record r is the rows offsets[r]:offsets[r+1]
    conversation [R]    int64          the index of the conversation in the data file
    crc32        [R]    int64          over the record's ids, mask and features

A shard is written under a temporary name, synced and renamed, so a reader never sees a part of one. The classic
layout of the public EAGLE scripts (``data_<n>.ckpt`` pickles) is read too, see `eagle.classic_dumps`.
"""

from __future__ import annotations

import re
import shutil
import zlib
from bisect import bisect_right
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

import numpy as np
import torch
from safetensors import SafetensorError, safe_open

from eagle.cli import RequestError, WorkError, fsync_folder, read_json
from eagle.tensor_file import write_tensors

FORMAT_VERSION = 1
MANIFEST = "manifest.json"
DONE = "done.json"
LOG = "worker.log"
#: A shard is closed once it holds this much. Large enough that 68k conversations are a few thousand files,
#: small enough that a killed worker loses minutes, not hours.
SHARD_BYTES = 128 << 20

#: Folders a reshard leaves when it is interrupted after it began to change the store (see `eagle.reshard`).
INTERRUPTED_RESHARD = (".reshard-deleting", ".reshard-moving")

_SHARD_NAME = re.compile(r"shard-(\d{5,})\.safetensors")


@dataclass(frozen=True, slots=True)
class Record:
    """One conversation's features.

    input_ids: ``[T]`` int32. loss_mask: ``[T]`` uint8, unshifted. hidden_state: ``[T, H]``, row t is the target's
    last hidden state after its final norm at token t. conversation: its index in the data file.
    """

    conversation: int
    input_ids: torch.Tensor
    loss_mask: torch.Tensor
    hidden_state: torch.Tensor

    def __len__(self) -> int:
        return len(self.input_ids)

    def crc32(self) -> int:
        """A checksum over everything the record holds."""
        crc = 0
        for tensor in (self.input_ids, self.loss_mask, self.hidden_state):
            crc = zlib.crc32(tensor.contiguous().view(torch.uint8).numpy(), crc)
        return crc


class ShardWriter:
    """Appends records to the numbered shards of one folder.

    Every finished shard carries `progress`, the caller's own JSON string, as it was when the shard was closed:
    a resumed writer reads it back with `last_progress`. The caller decides when a shard may be closed, since
    only it knows where its work can be taken up again.

    Raises: OSError (disk full, read-only); what was finished before stays whole.
    """

    def __init__(self, folder: Path, *, shard_bytes: int = SHARD_BYTES) -> None:
        self.folder = folder
        self.shard_bytes = shard_bytes
        self._records: list[Record] = []
        self._bytes = 0
        folder.mkdir(parents=True, exist_ok=True)
        for leftover in folder.glob(".shard-*.tmp"):
            leftover.unlink()
        self._next = len(shard_paths(folder))

    def add(self, record: Record) -> None:
        self._records.append(record)
        self._bytes += record.hidden_state.nbytes

    @property
    def is_full(self) -> bool:
        return self._bytes >= self.shard_bytes

    def close_shard(self, progress: str = "{}") -> None:
        """Write the records gathered so far as one shard; none gathered, none written."""
        if not self._records:
            return
        path = self.folder / _shard_name(self._next)
        write_shard(path, self._records, progress)
        self._next += 1
        self._records, self._bytes = [], 0


def write_shard(path: Path, records: list[Record], progress: str = "{}") -> None:
    """Write `records` as one finished shard at `path`."""
    lengths = [len(record) for record in records]
    tensors = {
        "hidden_state": torch.cat([record.hidden_state for record in records]),
        "input_ids": torch.cat([record.input_ids for record in records]),
        "loss_mask": torch.cat([record.loss_mask for record in records]),
        "offsets": torch.from_numpy(np.cumsum([0, *lengths], dtype=np.int64)),
        "conversation": torch.tensor([record.conversation for record in records], dtype=torch.int64),
        "crc32": torch.tensor([record.crc32() for record in records], dtype=torch.int64),
    }
    temporary = path.with_name(f".{path.name}.tmp")
    try:
        write_tensors(temporary, tensors, {"format": str(FORMAT_VERSION), "progress": progress})
    except (OSError, SafetensorError) as error:
        temporary.unlink(missing_ok=True)
        free = shutil.disk_usage(path.parent).free
        raise WorkError(
            f"Could not write {path} ({sum(t.nbytes for t in tensors.values()) / 1e6:,.0f} MB, "
            f"{free / 1e6:,.0f} MB free): {error}. Every shard finished before is kept; make room and run the "
            "same command again to continue."
        ) from error
    temporary.replace(path)
    fsync_folder(path.parent)


def _shard_name(number: int) -> str:
    return f"shard-{number:05d}.safetensors"


def shard_paths(folder: Path) -> list[Path]:
    """The finished shards of one folder, in order."""
    return sorted(path for path in folder.glob("shard-*.safetensors") if _SHARD_NAME.fullmatch(path.name))


def drop_after_gap(folder: Path) -> None:
    """Delete the shards behind a missing one. A worker writes them in order, so it redoes everything from there."""
    for number, path in enumerate(shard_paths(folder)):
        if path.name != _shard_name(number):
            path.unlink()


def last_progress(folder: Path) -> str | None:
    """The `progress` string of the newest finished shard, None where there is none."""
    paths = shard_paths(folder)
    if not paths:
        return None
    with _open_shard(paths[-1]) as file:
        return file.metadata()["progress"]


def _open_shard(path: Path) -> Any:
    try:
        file = safe_open(path, framework="pt", device="cpu")
    except (SafetensorError, OSError) as error:
        raise WorkError(
            f"{path} is damaged: {error}. Restore it from a copy, or delete it and run data generation again: it "
            "redoes what is missing."
        ) from error
    version = (file.metadata() or {}).get("format")
    if version != str(FORMAT_VERSION):
        raise RequestError(f"{path} has store format {version!r}; this version reads format {FORMAT_VERSION}.")
    return file


class RecordSource(Protocol):
    """Something that holds records by position: a `Shard` or a folder of classic dumps."""

    path: Path
    conversations: np.ndarray
    lengths: np.ndarray

    def __len__(self) -> int: ...
    def read(self, position: int, *, features: bool = True) -> Record: ...


class Shard:
    """One finished shard, memory-mapped: a record is read when it is asked for, the index is kept."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self._file: Any = None
        with _open_shard(path) as file:
            self.offsets = file.get_tensor("offsets").numpy()
            self.conversations = file.get_tensor("conversation").numpy()
            self._crc32 = file.get_tensor("crc32").numpy()
            hidden = file.get_slice("hidden_state")
            self.hidden_size = hidden.get_shape()[1]
            self.dtype_code = hidden.get_dtype()
        self.lengths = np.diff(self.offsets)

    def __getstate__(self) -> dict[str, Any]:
        # A data-loader worker opens its own mapping; handles do not travel between processes.
        return {**self.__dict__, "_file": None}

    def __len__(self) -> int:
        return len(self.conversations)

    @property
    def tokens(self) -> int:
        return int(self.offsets[-1])

    def read(self, position: int, *, features: bool = True) -> Record:
        """Record `position` of this shard; without `features` its hidden_state is empty ``[0, H]``.

        Raises: WorkError where the checksum does not match.
        """
        if self._file is None:
            self._file = _open_shard(self.path)
        start, end = int(self.offsets[position]), int(self.offsets[position + 1])
        record = Record(
            int(self.conversations[position]),
            self._file.get_slice("input_ids")[start:end],
            self._file.get_slice("loss_mask")[start:end],
            self._file.get_slice("hidden_state")[start : end if features else start],
        )
        if features and record.crc32() != int(self._crc32[position]):
            raise WorkError(
                f"{self.path} is damaged: the checksum of record {position} (conversation {record.conversation}) "
                "does not match. Restore the file from a copy, or delete it and run data generation again."
            )
        return record


class FeatureStore:
    """Every record below a folder, whoever wrote it and however it was sharded.

    ``store[i]`` is a `Record`. The order depends on the conversations alone, not on workers, shards or
    folders: sorted by data file and conversation.

    manifests: one for every generation job below the folder (none for classic dumps).

    Raises: FileNotFoundError, RequestError (nothing in it, mixed hidden sizes or dtypes).
    """

    def __init__(self, folder: str | Path, flag: str = "--tmpdir") -> None:
        from eagle.classic_dumps import find_classic_dumps  # it builds on this module

        self.folder = Path(folder)
        if not self.folder.is_dir():
            raise FileNotFoundError(f"{flag} {folder}: no such folder; expected the output folder of allocation.py.")
        for name in INTERRUPTED_RESHARD:
            if (self.folder / name).is_dir():
                raise RequestError(
                    f"{flag} {folder}: resharding was interrupted here. Nothing is lost; run the same "
                    "reassign_data_num.py command again to finish it."
                )
        self.manifests: dict[Path, dict] = {}
        groups: list[tuple[str, RecordSource]] = []
        for path in sorted(self.folder.rglob("shard-*.safetensors")):
            if _SHARD_NAME.fullmatch(path.name) and not _hidden(path, self.folder):
                groups.append((self._data_digest(path.parent), Shard(path)))
        groups += [("", dump) for dump in find_classic_dumps(self.folder)]
        if not groups:
            raise RequestError(
                f"{flag} {folder}: no finished records in it; expected the output folder of allocation.py "
                "(shard-*.safetensors) or a folder of data_*.ckpt dumps."
            )
        self.sources = [source for _, source in groups]
        self._check_shapes(flag)
        entries = sorted(
            (digest, int(conversation), number, position)
            for number, (digest, source) in enumerate(groups)
            for position, conversation in enumerate(source.conversations)
        )
        keys = [(digest, conversation) for digest, conversation, _, _ in entries if digest]
        if len(set(keys)) < len(keys):
            raise RequestError(
                f"{flag} {folder}: {len(keys) - len(set(keys)):,} conversations are in it more than once (two copies "
                "of a store side by side?). Keep one copy."
            )
        self._places = [(number, position) for _, _, number, position in entries]
        self.lengths = np.array([self.sources[n].lengths[p] for n, p in self._places], dtype=np.int64)

    def _data_digest(self, folder: Path) -> str:
        """The digest of the data file behind a folder of shards, from the manifest that describes it."""
        for holder in (folder, folder.parent):
            path = holder / MANIFEST
            if path in self.manifests or path.is_file():
                if path not in self.manifests:
                    self.manifests[path] = read_manifest(path)
                return self.manifests[path]["data"].get("digest") or str(holder)
        return str(folder)

    def _check_shapes(self, flag: str) -> None:
        shapes = {(source.hidden_size, source.dtype_code): source.path for source in self.sources}
        if len(shapes) > 1:
            found = "; ".join(f"{path}: hidden size {size}, {dtype}" for (size, dtype), path in shapes.items())
            raise RequestError(f"{flag} {self.folder} mixes stores of different targets ({found}). Separate them.")

    @property
    def hidden_size(self) -> int:
        return self.sources[0].hidden_size

    @property
    def tokens(self) -> int:
        return int(self.lengths.sum())

    def __len__(self) -> int:
        return len(self._places)

    def __getitem__(self, index: int) -> Record:
        number, position = self._places[index]
        return self.sources[number].read(position)

    def loss_mask(self, index: int) -> torch.Tensor:
        """The loss mask ``[T]`` of a record, without reading its features."""
        number, position = self._places[index]
        return self.sources[number].read(position, features=False).loss_mask

    def __iter__(self) -> Iterator[Record]:
        return (self[index] for index in range(len(self)))

    def unfinished(self) -> list[Path]:
        """The folders of jobs whose data generation has not come to its end."""
        return [path.parent for path, manifest in self.manifests.items() if not manifest.get("complete")]

    def check_target(self, digest: str, basepath: Path) -> None:
        """Raises: RequestError where a manifest names another target than the one with that fingerprint."""
        for path, manifest in self.manifests.items():
            target = manifest["target"]
            if target.get("fingerprint") not in (None, digest):
                raise RequestError(
                    f"{path.parent} holds features of {target.get('name')} (fingerprint "
                    f"{target['fingerprint'][:12]}), but --basepath {basepath} is another model (fingerprint "
                    f"{digest[:12]}). Train against the model the features came from, or run allocation.py again."
                )


def _hidden(path: Path, root: Path) -> bool:
    return any(part.startswith(".") for part in path.relative_to(root).parts)


def read_manifest(path: Path) -> dict:
    """Raises: RequestError for a file that is not a manifest or of a newer format."""
    manifest = read_json(path, "a store's manifest")
    if manifest.get("format_version") != FORMAT_VERSION:
        raise RequestError(
            f"{path}: store format {manifest.get('format_version')!r}; this version reads format {FORMAT_VERSION}."
        )
    return manifest


def cut_evenly(tokens: np.ndarray, parts: int) -> list[int]:
    """Where to cut a row of records into `parts` of about equal tokens: ``parts + 1`` record indices."""
    ends = np.cumsum(tokens).tolist()
    total = ends[-1] if ends else 0
    cuts = [0]
    for part in range(1, parts):
        goal = total * part / parts
        at = bisect_right(ends, goal)
        # Either side of the goal may be nearer.
        if at < len(ends) and ends[at] - goal < goal - (ends[at - 1] if at else 0):
            at += 1
        cuts.append(max(at, cuts[-1]))
    return [*cuts, len(ends)]
