"""Hidden states on their way from inside an engine to the feature source that started it.

An engine in the source's own process hands over the tensors themselves, on the device where they are. One that has
processes of its own (tensor and pipeline parallelism) writes a file for each sequence into a folder in memory where
there is room for it, which the source reads and takes away at once.
"""

from __future__ import annotations

import atexit
import fcntl
import os
import shutil
import tempfile
from dataclasses import dataclass
from pathlib import Path

import torch
from safetensors.torch import load_file, save_file

from eagle.errors import WorkError

_IN_MEMORY = Path("/dev/shm")
#: Free bytes that the folder in memory has to have.
_ROOM = 2 << 30
_PREFIX = "eagle-states-"
_NAME = "states"

#: Of this process, by key.
_handed: dict[str, torch.Tensor] = {}
#: The folders of this process.
_own: list[Path] = []


@dataclass(frozen=True, slots=True)
class Handover:
    """Between one engine and one source. folder: where the files go; None within one process."""

    folder: Path | None = None

    def put(self, key: str, states: torch.Tensor) -> None:
        """Hand over the states of one sequence, ``[T, layers, H]``."""
        if self.folder is None:
            _handed[key] = states
            return
        temporary = self.folder / f"{key}.tmp"
        save_file({_NAME: states.contiguous().cpu()}, temporary)
        temporary.replace(self.folder / key)

    def take(self, key: str) -> torch.Tensor:
        """What was put under that key, once. Raises: WorkError where nothing was."""
        states = _handed.pop(key, None) if self.folder is None else _read(self.folder / key)
        if states is None:
            raise WorkError(
                "The engine finished a sequence without handing over its hidden states. Its log says why, perhaps; "
                "without --feature_source the features are computed by transformers."
            )
        return states


def _read(path: Path) -> torch.Tensor | None:
    if not path.is_file():
        return None
    states = load_file(path)[_NAME]
    path.unlink()
    return states


def _places() -> list[Path]:
    return [place for place in (_IN_MEMORY, Path(tempfile.gettempdir())) if place.is_dir()]


@atexit.register
def remove_own() -> None:
    """Take away the folders of this process, of which nothing is read any more."""
    while _own:
        shutil.rmtree(_own.pop(), ignore_errors=True)


def clean_up() -> None:
    """Take away the folders that killed processes left."""
    for place in _places():
        for old in place.glob(f"{_PREFIX}*"):
            _take_away(old)


class Folder:
    """A folder for files, this process's while it lives: in memory where there is room, else where others are.

    room: bytes that the files in it may take at one time.
    """

    def __init__(self, room: int = 0) -> None:
        places, room = _places(), max(room, _ROOM)
        roomy = [place for place in places if os.access(place, os.W_OK) and shutil.disk_usage(place).free >= room]
        # Held before it has the name by which others look for those that nobody holds.
        made = Path(tempfile.mkdtemp(prefix=f".{_PREFIX}", dir=(roomy or places[-1:])[0]))
        self._lock = os.open(made, os.O_RDONLY)
        fcntl.flock(self._lock, fcntl.LOCK_EX)
        self.path = made.rename(made.with_name(made.name[1:]))
        _own.append(self.path)


def _take_away(folder: Path) -> None:
    """A folder that no process holds any more."""
    try:
        lock = os.open(folder, os.O_RDONLY)
    except OSError:  # another user's, or gone by now
        return
    try:
        fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        shutil.rmtree(folder, ignore_errors=True)
    except BlockingIOError:
        pass
    finally:
        os.close(lock)
