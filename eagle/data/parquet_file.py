"""Random access to the records of a Parquet file, without loading it: a row is a record, a column one of its fields.

Needs pyarrow. What a row does not have is null in its record. A row group (a file may
be a single one) is decoded in small batches from its start, so that any file fits in the memory; records that are
asked for in the order of the file cost one pass over it.
"""

from __future__ import annotations

import os
from bisect import bisect_right
from collections.abc import Iterator
from dataclasses import dataclass
from itertools import accumulate
from pathlib import Path
from typing import Any

from eagle.data.arrow_file import import_pyarrow, read_columns, record_of, sentence
from eagle.data.record_file import RecordFile
from eagle.errors import RequestError, WorkError

MAGIC = b"PAR1"
SUFFIX = ".parquet"

#: Rows that are decoded, and held, at a time.
_BATCH = 256


def is_parquet(path: Path) -> bool:
    """Whether a file is Parquet, by its name or by its first bytes."""
    if path.suffix.lower() == SUFFIX:
        return True
    with path.open("rb") as file:
        return file.read(len(MAGIC)) == MAGIC


@dataclass(slots=True)
class _Cursor:
    """How far one process has read: `batch` holds the rows from `start` on, of the row group that `batches` reads."""

    process: int
    file: Any
    group: int
    batches: Iterator[Any]
    start: int
    batch: Any = ()


class ParquetFile(RecordFile):
    """Records of a Parquet file, by index: ``len(file)``, ``file[i]``, iteration. Nested columns are lists and dicts.

    Columns of dates and times are left out: a record says nothing in them, and not every such value has a Python form.

    ``file[i]`` raises ValueError where a text of that row is not UTF-8, as `JsonFile` does for a bad record.

    Raises: RequestError where pyarrow is missing, or the file is damaged or ends too early: it is decoded once when it
    is opened. (What a Parquet file holds is listed at its end, so that of a cut one nothing can be used.)
    WorkError where it can no longer be read afterwards.
    """

    def __init__(self, path: str | Path, *, flag: str = "--data_path") -> None:
        pyarrow = import_pyarrow(f"{flag} {path} is a Parquet file")
        self.path = Path(path)
        self._unreadable = (pyarrow.ArrowException, OSError)
        self._cursor: _Cursor | None = None
        try:
            file = self._open()
            self._columns = read_columns(file.schema_arrow)
            groups = [file.metadata.row_group(group).num_rows for group in range(file.num_row_groups)]
            self._starts = list(accumulate(groups, initial=0))
            for group, rows in enumerate(groups):
                decoded = sum(len(batch) for batch in self._batches(file, group))
                if decoded != rows:
                    raise OSError(f"row group {group} holds {decoded} rows instead of {rows}")
        except self._unreadable as error:
            raise RequestError(
                f"{flag} {path} is a damaged Parquet file, or none: {sentence(error)} Fetch the file again."
            ) from error

    def __len__(self) -> int:
        return self._starts[-1]

    def __getitem__(self, index: int) -> Any:
        index = range(len(self))[index]  # IndexError where there is none
        try:
            cursor = self._cursor_at(index)
        except self._unreadable as error:
            raise WorkError(f"{self.path} cannot be read any more: {sentence(error)}") from error
        return record_of(cursor.batch.slice(index - cursor.start, 1))

    def release(self) -> None:
        self._cursor = None

    def _open(self) -> Any:
        import pyarrow.parquet

        return pyarrow.parquet.ParquetFile(self.path, memory_map=True, page_checksum_verification=True)

    def _batches(self, file: Any, group: int) -> Iterator[Any]:
        # pyarrow's threads do not survive the fork that tokenising makes.
        return file.iter_batches(_BATCH, row_groups=[group], columns=self._columns, use_threads=False)

    def _cursor_at(self, index: int) -> _Cursor:
        """This process's cursor, moved to the batch that holds row `index`: forward, or from its row group's start."""
        cursor, group = self._cursor, bisect_right(self._starts, index) - 1
        if cursor is None or cursor.process != os.getpid():  # in a forked process the parent's is not used
            cursor = None
        if cursor is None or cursor.group != group or index < cursor.start:
            file = cursor.file if cursor else self._open()
            cursor = _Cursor(os.getpid(), file, group, self._batches(file, group), self._starts[group])
            self._cursor = cursor
        while index >= cursor.start + len(cursor.batch):
            start = cursor.start + len(cursor.batch)
            batch = next(cursor.batches, None)
            if batch is None:
                raise OSError("it has fewer rows than when it was opened")
            cursor.start, cursor.batch = start, batch
        return cursor
