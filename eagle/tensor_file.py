"""Writing safetensors files that survive a power cut and that other users can read."""

from __future__ import annotations

import os
from pathlib import Path

import torch
from safetensors.torch import save_file


def write_tensors(path: Path, tensors: dict[str, torch.Tensor], metadata: dict[str, str] | None = None) -> None:
    """Write and sync a safetensors file.

    safetensors creates its files readable by their owner alone; a serving process often runs as somebody else, so
    the file gets the permissions any new file would.

    Raises: OSError, safetensors.SafetensorError (disk full).
    """
    save_file(tensors, path, metadata=metadata or {"format": "pt"})
    umask = os.umask(0)
    os.umask(umask)
    path.chmod(0o666 & ~umask)
    descriptor = os.open(path, os.O_RDWR)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
