"""What is wrong with the files of a store, kept apart from what is wrong with the machine that reads them."""

from __future__ import annotations

import errno
import re
from collections.abc import Iterator
from dataclasses import dataclass, field
from functools import cache
from pathlib import Path

import psutil

from eagle.errors import WorkError


class Damaged(WorkError):
    """A file, or a record in it, is not what was written there. Raised for nothing else: it may be left out."""


class Exhausted(WorkError):
    """The machine has no more open files, memory maps or memory for this process. The file may be as good as any."""


class Replaced(WorkError):
    """A file of a store was replaced, moved or deleted while the store was being read. It may be as good as any."""

    def __init__(self, path: Path) -> None:
        super().__init__(
            f"{path} is not the file any more that it was when the store was opened: it was replaced, moved or deleted "
            "while the store was being read. It need not be damaged: keep it, and run the same command again. Do not "
            "reshard a store in place or generate into it while a job reads it."
        )

    def __reduce__(self) -> tuple[type[WorkError], tuple[object, ...]]:
        """For other processes of a run: its words are there already."""
        return WorkError, self.args


@dataclass(frozen=True, slots=True)
class Damage:
    """What of a store cannot be used; small, and the same on every machine that has a copy of the store.

    messages: in words, one for every file and record. files: that cannot be opened, relative to the store's folder.
    records: by file, the positions in it of those that cannot be read; a dump is at position 0 of its file.
    """

    messages: list[str] = field(default_factory=list)
    files: list[str] = field(default_factory=list)
    records: dict[str, list[int]] = field(default_factory=dict)

    def __bool__(self) -> bool:
        return bool(self.messages)


#: How libraries spell what the system says, where they do not pass on its number: torch and safetensors.
_SPELLED = {
    errno.ENOMEM: re.compile(r"Cannot allocate memory|can't allocate memory|not enough memory|out of memory", re.I),
    errno.EMFILE: re.compile(r"Too many open files(?! in system)", re.I),
    errno.ENFILE: re.compile(r"Too many open files in system", re.I),
}
_MAX_MAPS = Path("/proc/sys/vm/max_map_count")


def exhausted(error: BaseException, path: Path) -> Exhausted | None:
    """What ran out while `path` was being opened or read, where that is what the error says: how much of it is used,
    and what helps. None for any other error."""
    code = next(filter(None, map(_code, _chain(error))), None)
    if code is None:
        return None
    return Exhausted(f"{path} could not be read: {_what_ran_out(code)} The file itself need not be damaged: keep it.")


def _chain(error: BaseException | None) -> Iterator[BaseException]:
    while error is not None:
        yield error
        error = error.__cause__ or error.__context__


def _code(error: BaseException) -> int | None:
    if isinstance(error, MemoryError):
        return errno.ENOMEM
    if isinstance(error, OSError) and error.errno is not None:
        return error.errno if error.errno in _SPELLED else None
    # Only what comes from the libraries: a file's own bytes may be quoted in other errors.
    if isinstance(error, RuntimeError):
        return next((code for code, spelled in _SPELLED.items() if spelled.search(str(error))), None)
    return None


def _what_ran_out(code: int) -> str:
    if code == errno.ENFILE:
        return "all processes together have as many files open as the machine allows (fs.file-max). End some of them."
    if code == errno.EMFILE:
        return (
            f"this process has {_open_files()} files open and may have {_limit('RLIMIT_NOFILE')} ('ulimit -n'). Raise "
            "it, e.g. with 'ulimit -n 65536' (Docker: --ulimit nofile=65536:65536), and run the same command again."
        )
    maps, most = memory_maps(), max_memory_maps()
    if maps >= 0.95 * most:
        return (
            f"this process holds {maps:,} memory maps, and vm.max_map_count allows {most:,}. Raise it with 'sysctl -w "
            f"vm.max_map_count={16 * most}' and run the same command again."
        )
    address = _limit("RLIMIT_AS")
    limited = "" if address == "unlimited" else f", of at most {int(address) / 2**20:,.0f} MiB ('ulimit -v')"
    return (
        f"there is no memory left for it: this process holds {_held_mib():,.0f} MiB{limited}, and the machine has "
        f"{_free_mib():,.0f} MiB available. It holds {maps:,} of {most:,} memory maps, which are not what ran out. "
        "End other processes, or raise the limit of this one (its container's, too)."
    )


@cache
def max_memory_maps() -> int:
    """How many memory maps a process may hold."""
    try:
        return int(_MAX_MAPS.read_text())
    except (OSError, ValueError):  # not Linux
        return 65530


def memory_maps() -> int:
    """How many this process holds; 0 where that cannot be told."""
    try:
        with Path("/proc/self/maps").open("rb") as file:
            return sum(1 for _ in file)
    except OSError:
        return 0


def _open_files() -> int | str:
    try:
        return sum(1 for _ in Path("/proc/self/fd").iterdir())
    except OSError:  # among others: listing takes an open file
        return "too many"


def _limit(name: str) -> int | str:
    try:
        import resource  # not on Windows
    except ImportError:
        return "unlimited"
    soft = resource.getrlimit(getattr(resource, name))[0]
    return "unlimited" if soft == resource.RLIM_INFINITY else soft


def _held_mib() -> float:
    try:
        return psutil.Process().memory_info().vms / 2**20
    except Exception:  # it reads files, which may be what ran out
        return float("nan")


def _free_mib() -> float:
    try:
        return psutil.virtual_memory().available / 2**20
    except Exception:
        return float("nan")
