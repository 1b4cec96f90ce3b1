"""The records of a data file, whichever kind of file holds them: what every step opens conversations with."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any, Protocol

from eagle.data.json_file import Damage, JsonFile
from eagle.data.parquet_file import SUFFIX, ParquetFile, is_parquet
from eagle.errors import RequestError

#: What names a file of records; any other name is looked into.
SUFFIXES = (".json", ".jsonl", SUFFIX)

_EXPECTED = "expected a JSON array, JSON Lines or Parquet file."


class Records(Protocol):
    """Records by index, read when they are asked for.

    ``records[i]`` raises ValueError where that record cannot be read while those around it can. damage: what was left
    out at the end of the file, where that was allowed. is_array: whether the file is one JSON array.
    """

    damage: Damage | None
    is_array: bool

    def __len__(self) -> int: ...
    def __getitem__(self, index: int) -> Any: ...
    def __iter__(self) -> Iterator[Any]: ...
    def digest(self) -> str:
        """sha256 of the file."""
        ...


def open_records(path: str | Path, *, allow_truncated: bool = False, flag: str = "--data_path") -> Records:
    """The records of a JSON array, JSON Lines or Parquet file.

    Raises: FileNotFoundError; RequestError when the file is empty, of no such kind, or damaged. With `allow_truncated`
    the whole records before the damage of a JSON file are used instead, and `damage` says what was left out.
    """
    path = Path(path)
    if not path.exists():
        raise FileNotFoundError(f"{flag} {path}: no such file; {_EXPECTED}")
    if not path.is_file():
        raise RequestError(f"{flag} {path} is a folder; {_EXPECTED}")
    if path.stat().st_size == 0:
        raise RequestError(f"{flag} {path} is empty; {_EXPECTED}")
    if is_parquet(path):
        return ParquetFile(path, flag=flag)
    return JsonFile(path, allow_truncated=allow_truncated, flag=flag)
