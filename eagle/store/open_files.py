"""The files of a store that are open for reading: the ones used last, mapped into memory, in one place of a process.

A system allows a process some tens of thousands of memory maps (Linux: ``vm.max_map_count``, 65,530) and often no more
than 1024 open files, and a store has more files than either. So a mapping is kept for the files that were read last
only. A tensor that was read keeps its own mapping open as long as it lives; where too many of those are alive, further
tensors are copies.

Safe in several threads. A forked child begins with nothing open, and nothing here travels to other processes.
"""

from __future__ import annotations

import errno
import math
import mmap
import os
import threading
import weakref
from collections import OrderedDict
from collections.abc import Sequence
from pathlib import Path
from typing import BinaryIO, NamedTuple

import torch

from eagle.store.damage import exhausted, max_memory_maps

#: The most files kept open. More gain nothing: a random read of a large store finds its file closed in any case, and
#: opening one takes less than checking the record that is read from it.
MOST = 256


class Span(NamedTuple):
    """Where a tensor lies in a file: its first byte, and what it is."""

    start: int
    dtype: torch.dtype
    shape: tuple[int, ...]


#: Which file it was that was opened: another one may come to stand under its name, with its number too.
Stamp = tuple[int, int, int, int]


class Restamped(Exception):
    """A file has another stamp than it had: it was replaced or changed, or only touched, copied or mounted again."""


def stamp_of(file: BinaryIO) -> Stamp:
    status = os.fstat(file.fileno())
    return status.st_dev, status.st_ino, status.st_size, status.st_mtime_ns


def most_open() -> int:
    """How many files to keep open: an eighth of those this process may have, and far fewer maps than it may have."""
    try:
        import resource  # not on Windows

        files = resource.getrlimit(resource.RLIMIT_NOFILE)[0]
    except ImportError:
        files = 512
    if files < 0:  # no limit
        files = MOST * 8
    return max(1, min(MOST, files // 8, max_memory_maps() // 64))


class OpenFiles:
    """Mappings by file, the most recently used ones."""

    def __init__(self) -> None:
        self.forget()

    def forget(self) -> None:
        """Close everything that no tensor needs. What a lock was doing when a process was forked is lost with it."""
        self._lock = threading.Lock()
        self._kept: OrderedDict[tuple[Path, Stamp], mmap.mmap] = OrderedDict()
        self._alive: weakref.WeakSet[mmap.mmap] = weakref.WeakSet()

    @property
    def alive(self) -> int:
        """How many mappings there are: those kept, and those of tensors that were read and live on."""
        return len(self._alive)

    def read(self, path: Path, stamp: Stamp, spans: Sequence[Span]) -> list[torch.Tensor]:
        """Tensors of the file with that stamp: parts of its mapping, or copies where too many mappings are alive.
        Writing to them does not change the file.

        Raises: Restamped; Exhausted; OSError.
        """
        try:
            mapping = self._mapping(path, stamp)
            tensors = [_tensor(mapping, span) for span in spans]
            # Twice as many as are kept may live on in tensors: three eighths of the files a process may have, in all.
            return [tensor.clone() for tensor in tensors] if self.alive > 2 * most_open() else tensors
        except (OSError, MemoryError, RuntimeError) as error:
            if found := exhausted(error, path):
                raise found from error
            raise

    def _mapping(self, path: Path, stamp: Stamp) -> mmap.mmap:
        key = path, stamp
        with self._lock:
            if key in self._kept:
                self._kept.move_to_end(key)
                return self._kept[key]
        try:
            mapping = _map(path, stamp)
        except OSError as error:
            if error.errno not in (errno.EMFILE, errno.ENFILE, errno.ENOMEM):
                raise
            with self._lock:
                self._kept.clear()
            mapping = _map(path, stamp)
        with self._lock:
            self._alive.add(mapping)
            self._kept[key] = mapping
            while len(self._kept) > most_open():
                self._kept.popitem(last=False)
        return mapping


def _map(path: Path, stamp: Stamp) -> mmap.mmap:
    with path.open("rb") as file:
        if stamp_of(file) != stamp:
            raise Restamped
        if os.name != "posix":
            return mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_COPY)
        return mmap.mmap(file.fileno(), 0, flags=mmap.MAP_PRIVATE, prot=mmap.PROT_READ | mmap.PROT_WRITE)


def _tensor(mapping: mmap.mmap, span: Span) -> torch.Tensor:
    count = math.prod(span.shape)
    if not count:
        return torch.empty(span.shape, dtype=span.dtype)
    return torch.frombuffer(mapping, dtype=span.dtype, count=count, offset=span.start).view(span.shape)


OPEN = OpenFiles()
if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=OPEN.forget)
