"""Writing safetensors files that survive a power cut and that other users can read."""

from __future__ import annotations

import json
import os
import re
from pathlib import Path

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

    What safetensors' own writer makes of the joined tensors, without joining them in memory first. The format: eight
    bytes of header length, a JSON header, then the tensors back to back, the widest dtypes first: so all are aligned.

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


def map_arrays(path: Path) -> dict[str, np.ndarray]:
    """The tensors of a safetensors file as read-only arrays over a map of it: what is not touched takes no memory.

    The header is trusted: open the file with safetensors first, which compares it with the file's size.
    """
    with path.open("rb") as file:
        size = int.from_bytes(file.read(8), "little")
        header = json.loads(file.read(size))
    header.pop("__metadata__", None)
    mapped = np.asarray(np.memmap(path, np.uint8, mode="r"))[8 + size :]
    arrays = {}
    for name, entry in header.items():
        start, end = entry["data_offsets"]
        arrays[name] = mapped[start:end].view(_NUMPY[entry["dtype"]]).reshape(entry["shape"])
    return arrays


_NUMPY = {"U8": np.uint8, "I8": np.int8, "I16": np.int16, "I32": np.int32, "I64": np.int64}
