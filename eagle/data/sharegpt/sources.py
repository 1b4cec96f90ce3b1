"""Where records come from: JSON arrays, JSON Lines, Parquet, Arrow, CSV and TSV, read one record at a time.

A record that cannot be read comes as the `Unusable` that says why, so that the ones after it are not lost.
"""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any, Protocol

from eagle.data.arrow_file import is_arrow
from eagle.data.cleaning import DROP_REASONS
from eagle.data.json_file import TooDeep
from eagle.data.parquet_file import is_parquet
from eagle.data.reader import SUFFIXES, TABLE_SUFFIXES, first_character, open_records, refuse_by_first_bytes
from eagle.data.sharegpt.formats import Unusable, is_turn
from eagle.data.sharegpt.tables import FLAG, TABLES, TableSource
from eagle.errors import RequestError


class Source(Protocol):
    """Records of a file or folder. Iterating gives each, or the `Unusable` that says why it cannot be read."""

    notes: list[str]
    paths: list[Path]

    @property
    def count(self) -> int | None: ...
    def samples(self) -> list[Any]: ...
    def __iter__(self) -> Iterator[Any]: ...


class RecordSource:
    """What `open_records` reads. A JSON array of turns is one conversation."""

    def __init__(self, path: Path, allow_truncated: bool) -> None:
        self._file = open_records(path, allow_truncated=allow_truncated, flag=FLAG)
        self.notes = list(self._file.notes)
        self.paths = [file.path for file in self._file.files]
        for file in self._file.files:
            if damage := file.damage:
                said = f"left out what follows byte {damage.byte:,} (record {damage.record:,}): {damage.reason}"
                self.notes.append(said if file is self._file else f"{file.path}: {said}")
        self._is_one_conversation = self._file.is_array and self._looks_like_one_conversation(path)
        self.count = 1 if self._is_one_conversation else len(self._file)

    def _looks_like_one_conversation(self, path: Path) -> bool:
        """JSON Lines of a single line that is a list cannot be told from an array by its bytes alone."""
        samples = self._samples()
        is_turns = all(is_turn(turn) for turn in samples)
        is_texts = path.suffix.lower() != ".json" and all(isinstance(text, str) for text in samples)
        return is_turns or is_texts

    def samples(self) -> list[Any]:
        return [list(self._records())] if self._is_one_conversation else self._samples()

    def _samples(self) -> list[Any]:
        """The first records and some from all over the file: a file may begin oddly."""
        count = len(self._file)
        picked = sorted({*range(min(count, 20)), *range(0, count, max(1, count // 80))})
        return [self._record(index) for index in picked]

    def __iter__(self) -> Iterator[Any]:
        return iter([list(self._records())]) if self._is_one_conversation else self._records()

    def _records(self) -> Iterator[Any]:
        return (self._record(index) for index in range(len(self._file)))

    def _record(self, index: int) -> Any:
        try:
            return self._file[index]
        except TooDeep:
            return Unusable(DROP_REASONS["nested_too_deeply"])
        except ValueError:
            return Unusable(DROP_REASONS["invalid_json"])


def open_source(path: Path, told: str | None, allow_truncated: bool) -> Source:
    """The records of a file, by its suffix or as --format (`told`) says, or of a folder.

    Raises: RequestError for a file that is empty, compressed, not UTF-8, or of no known kind, and as `open_records`
    does.
    """
    if not path.is_file():
        if told in TABLES:
            raise RequestError(f"--format {told}: {FLAG} {path} is a folder; name the tables in it, one by one.")
        return RecordSource(path, allow_truncated)
    if not path.stat().st_size:
        raise RequestError(f"{FLAG} {path} is empty; expected JSON, JSON Lines, Parquet, Arrow, CSV or TSV.")
    refuse_by_first_bytes(path, FLAG)
    if is_parquet(path) or is_arrow(path):
        return RecordSource(path, allow_truncated)
    table = told if told in TABLES else TABLE_SUFFIXES.get(path.suffix.lower())
    if table:
        return TableSource(path, table, allow_truncated)
    if path.suffix.lower() not in SUFFIXES and first_character(path) not in (b"{", b"["):
        raise RequestError(
            f"{FLAG} {path}: neither its name nor its first bytes say what it is. Expected .json, .jsonl, "
            ".parquet, .arrow, .csv or .tsv; for a table under another name pass --format csv or --format tsv."
        )
    return RecordSource(path, allow_truncated)
