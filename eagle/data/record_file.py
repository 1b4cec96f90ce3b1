"""Records by index, and what holds them: one file, or several that are read as one.

RecordFile     what JSON, Parquet and Arrow files have in common
JoinedRecords  those of several files, one file behind the other: a folder, or several paths
"""

from __future__ import annotations

import hashlib
from bisect import bisect_right
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import accumulate
from pathlib import Path
from typing import Any, Protocol


@dataclass(frozen=True, slots=True)
class Damage:
    """Where a data file stops being whole: the record it happens in (0-based) and that record's first byte."""

    record: int
    byte: int
    reason: str


class Records(Protocol):
    """Records by index, read when they are asked for.

    ``records[i]`` raises ValueError where that record cannot be read while those around it can. is_array: whether they
    are one JSON array. notes: what somebody who uses them should know.
    """

    notes: list[str]

    @property
    def is_array(self) -> bool: ...
    @property
    def files(self) -> Sequence[RecordFile]: ...
    def __len__(self) -> int: ...
    def __getitem__(self, index: int) -> Any: ...
    def __iter__(self) -> Iterator[Any]: ...
    def digest(self) -> str:
        """sha256 of the file, or over those of the files in their order."""
        ...

    def place(self, index: int) -> str:
        """Where record `index` lies, for people; empty where the index says it."""
        ...

    def release(self) -> None:
        """Give up what is held open for the next record; reading goes on all the same."""
        ...


class RecordFile:
    """One file of records. damage: what was left out at its end, where that was allowed."""

    path: Path
    damage: Damage | None = None
    is_array = False
    notes: list[str] = []  # noqa: RUF012 (nothing adds to it)

    def __len__(self) -> int:
        raise NotImplementedError

    def __getitem__(self, index: int) -> Any:
        raise NotImplementedError

    def __iter__(self) -> Iterator[Any]:
        return (self[index] for index in range(len(self)))

    @property
    def files(self) -> Sequence[RecordFile]:
        return (self,)

    def digest(self) -> str:
        digest = hashlib.sha256()
        with self.path.open("rb") as file:
            while part := file.read(1 << 24):
                digest.update(part)
        return digest.hexdigest()

    def place(self, index: int) -> str:
        return ""

    def release(self) -> None:
        return None


class JoinedRecords:
    """The records of `parts`, one part behind the other."""

    def __init__(self, parts: Sequence[Records], notes: Sequence[str] = ()) -> None:
        self.parts = parts
        self.notes = [*notes, *(note for part in parts for note in part.notes)]
        self._starts = list(accumulate(map(len, parts), initial=0))
        self._last = 0

    @property
    def files(self) -> list[RecordFile]:
        return [file for part in self.parts for file in part.files]

    @property
    def is_array(self) -> bool:
        return len(self.parts) == 1 and self.parts[0].is_array

    def __len__(self) -> int:
        return self._starts[-1]

    def __getitem__(self, index: int) -> Any:
        part, own = self._part(index)
        if part != self._last:  # of a thousand files not all are to be open
            self.parts[self._last].release()
            self._last = part
        return self.parts[part][own]

    def __iter__(self) -> Iterator[Any]:
        return (self[index] for index in range(len(self)))

    def digest(self) -> str:
        return joined_digest([part.digest() for part in self.parts])

    def place(self, index: int) -> str:
        if len(self.files) == 1:
            return ""
        part, own = self._part(index)
        found = self.parts[part]
        return found.place(own) or f"record {own:,} of {found.files[0].path}"

    def release(self) -> None:
        self.parts[self._last].release()

    def _part(self, index: int) -> tuple[int, int]:
        """The part that holds record `index`, and which of its records that is."""
        index = range(len(self))[index]  # IndexError where there is none
        part = bisect_right(self._starts, index) - 1
        return part, index - self._starts[part]


def notes_of(records: Records, end_num: int | None = None) -> list[str]:
    """What is left out of records that somebody named: other splits, the end of a damaged file.

    end_num: how many of them were asked for.
    """
    found, files = list(records.notes), records.files
    for file in files:
        if damage := file.damage:
            name = f"{file.path}: " if len(files) > 1 else ""
            found.append(
                f"--allow_truncated: {name}record {damage.record}, from byte {damage.byte}, is not whole and is "
                f"left out; {len(file):,} whole records are used"
            )
    if end_num and end_num > len(records):
        held = "the file holds" if len(files) == 1 else "the files hold"
        found.append(f"--end_num {end_num:,}: {held} {len(records):,} conversations; all are used")
    return found


def joined_digest(digests: Sequence[str]) -> str:
    """sha256 over those of several files; of a single one its own."""
    return digests[0] if len(digests) == 1 else hashlib.sha256("\n".join(digests).encode()).hexdigest()
