"""Safetensors files: writing them so that they survive a power cut and other users can read them, and their headers.

The format (https://github.com/huggingface/safetensors#format): eight bytes of header length, a JSON header, then the
tensors back to back.
"""

from __future__ import annotations

import json
import math
import os
import re
from dataclasses import dataclass
from pathlib import Path
from typing import BinaryIO

import numpy as np
import torch
from safetensors import SafetensorError
from safetensors.torch import save_file

#: How safetensors calls the dtypes that a store holds.
DTYPE_CODES = {
    torch.float32: "F32", torch.float16: "F16", torch.bfloat16: "BF16",
    torch.uint8: "U8", torch.int8: "I8", torch.int16: "I16", torch.int32: "I32", torch.int64: "I64",
}  # fmt: skip
if hasattr(torch, "float8_e4m3fn"):
    DTYPE_CODES[torch.float8_e4m3fn] = "F8_E4M3"


_DTYPES = {code: dtype for dtype, code in DTYPE_CODES.items()}
#: Those that numpy has as well.
_NUMPY = {"U8": "<u1", "I8": "<i1", "I16": "<i2", "I32": "<i4", "I64": "<i8", "F32": "<f4", "F16": "<f2"}
#: What safetensors' own reader allows a header to take.
_LONGEST_HEADER = 100_000_000


class NotWhole(ValueError):
    """A file that is no whole safetensors file. Says what is wrong, not with which file."""


@dataclass(frozen=True, slots=True)
class Entry:
    """A tensor in a file: start is its first byte there."""

    code: str
    shape: tuple[int, ...]
    start: int

    @property
    def dtype(self) -> torch.dtype:
        return _DTYPES[self.code]

    @property
    def nbytes(self) -> int:
        return math.prod(self.shape) * self.dtype.itemsize


def read_header(file: BinaryIO) -> tuple[dict[str, Entry], dict[str, str]]:
    """The tensors of a safetensors file and its metadata, checked as safetensors' own reader checks them.

    Nothing is mapped, and of the file no more is read than the header.

    Raises: NotWhole, also for tensors of a dtype that a store does not hold; OSError.
    """
    size = os.fstat(file.fileno()).st_size
    length = int.from_bytes(file.read(8), "little")
    if not 0 < length <= min(size - 8, _LONGEST_HEADER):
        raise NotWhole(f"it has {size:,} bytes, and its header should take {length:,}")
    try:
        header = json.loads(file.read(length).decode())
        metadata = header.pop("__metadata__", {})
        entries, sizes = {}, []
        for name, entry in header.items():
            start, end = entry["data_offsets"]
            entries[name] = Entry(entry["dtype"], tuple(entry["shape"]), 8 + length + start)
            if any(type(number) is not int or number < 0 for number in (start, end, *entries[name].shape)):
                raise NotWhole(f"its header places {name} at {entry}")
            if end - start != entries[name].nbytes:
                raise NotWhole(f"{name} should take {entries[name].nbytes:,} bytes and has {end - start:,}")
            sizes.append((start, end))
        if not all(isinstance(value, str) for value in metadata.values()):
            raise NotWhole("its metadata are not strings")
    except NotWhole:
        raise
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise NotWhole(f"its header is not one of safetensors ({type(error).__name__}: {error})") from error
    at = 0
    for start, end in sorted(sizes):
        if start != at:
            raise NotWhole("its header leaves a gap between tensors, or has them overlap")
        at = end
    if 8 + length + at != size:
        raise NotWhole(f"it has {size:,} bytes and should have {8 + length + at:,}")
    return entries, metadata


def read_array(file: BinaryIO, entry: Entry) -> np.ndarray:
    """A tensor of a file whose header was read, copied: nothing of the file stays mapped."""
    file.seek(entry.start)
    return np.frombuffer(file.read(entry.nbytes), dtype=_NUMPY[entry.code]).reshape(entry.shape).copy()


def write_tensors(path: Path, tensors: dict[str, torch.Tensor], metadata: dict[str, str] | None = None) -> None:
    """Write and sync a safetensors file.

    safetensors creates its files readable by their owner alone; a serving process often runs as somebody else, so
    the file gets the permissions any new file would.

    Raises: OSError (disk full, among others).
    """
    try:
        save_file(tensors, path, metadata=metadata or {"format": "pt"})
    except SafetensorError as error:
        code = re.search(r"os error (\d+)", str(error))
        if code is None:
            raise
        raise OSError(int(code[1]), os.strerror(int(code[1])), str(path)) from error
    umask = os.umask(0)
    os.umask(umask)
    path.chmod(0o666 & ~umask)
    descriptor = os.open(path, os.O_RDWR)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def write_pieces(path: Path, tensors: dict[str, list[torch.Tensor]], metadata: dict[str, str]) -> None:
    """Write and sync a safetensors file of tensors that come in pieces along their first dimension.

    What safetensors' own writer makes of the joined tensors, without joining them in memory first: the widest dtypes
    first, so that all are aligned.

    Raises: OSError (disk full, among others).
    """
    names = sorted(tensors, key=lambda name: (-tensors[name][0].element_size(), name))
    header: dict[str, object] = {"__metadata__": metadata}
    end = 0
    for name in names:
        first, start = tensors[name][0], end
        end += sum(piece.nbytes for piece in tensors[name])
        shape = [sum(map(len, tensors[name])), *first.shape[1:]]
        header[name] = {"dtype": DTYPE_CODES[first.dtype], "shape": shape, "data_offsets": [start, end]}
    text = json.dumps(header, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)
    with path.open("wb") as file:
        file.write(len(text).to_bytes(8, "little") + text)
        for name in names:
            for piece in filter(torch.numel, tensors[name]):  # an empty one has no other view
                file.write(piece.contiguous().view(torch.uint8).numpy().data)
        file.flush()
        os.fsync(file.fileno())


def map_arrays(path: Path) -> tuple[dict[str, np.ndarray], dict[str, str]]:
    """The tensors of a safetensors file as read-only arrays over a map of it, and its metadata: what is not touched
    takes no memory.

    Raises: as `read_header`.
    """
    with path.open("rb") as file:
        entries, metadata = read_header(file)
        mapped = np.asarray(np.memmap(file, np.uint8, mode="r"))
    arrays = {}
    for name, entry in entries.items():
        end = entry.start + entry.nbytes
        arrays[name] = mapped[entry.start : end].view(_NUMPY[entry.code]).reshape(entry.shape)
    return arrays, metadata
