"""Random access to the records of a Parquet file, without loading it: a row is a record, a column one of its fields.

Needs pyarrow, which nothing else here does. What a row does not have is null in its record. A row group (a file may
be a single one) is decoded in small batches from its start, so that any file fits in the memory; records that are
asked for in the order of the file cost one pass over it.
"""

from __future__ import annotations

import hashlib
import os
from bisect import bisect_right
from collections.abc import Iterator
from dataclasses import dataclass
from itertools import accumulate
from pathlib import Path
from typing import Any

from eagle.data.json_file import Damage
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


class ParquetFile:
    """Records of a Parquet file, by index: ``len(file)``, ``file[i]``, iteration. Nested columns are lists and dicts.

    Columns of dates and times are left out: a record says nothing in them, and not every such value has a Python form.

    ``file[i]`` raises ValueError where a text of that row is not UTF-8, as `JsonFile` does for a bad record.

    Raises: RequestError where pyarrow is missing, or the file has no rows, is damaged or ends too early: it is decoded
    once when it is opened. (What a Parquet file holds is listed at its end, so that of a cut one nothing can be used.)
    WorkError where it can no longer be read afterwards.
    """

    is_array = False
    damage: Damage | None = None

    def __init__(self, path: str | Path, *, flag: str = "--data_path") -> None:
        try:
            import pyarrow
        except ImportError as error:
            raise RequestError(
                f"{flag} {path} is a Parquet file, and pyarrow, which reads those, cannot be imported here ({error}); "
                "pip install pyarrow ('pyarrow<24' beside numpy 1.x), or give the records as JSON Lines."
            ) from error
        self.path = Path(path)
        self._unreadable = (pyarrow.ArrowException, OSError)
        self._cursor: _Cursor | None = None
        try:
            file = self._open()
            temporal = [field.name for field in file.schema_arrow if pyarrow.types.is_temporal(field.type)]
            self._columns = [name for name in file.schema_arrow.names if name not in temporal] if temporal else None
            groups = [file.metadata.row_group(group).num_rows for group in range(file.num_row_groups)]
            self._starts = list(accumulate(groups, initial=0))
            for group, rows in enumerate(groups):
                decoded = sum(len(batch) for batch in self._batches(file, group))
                if decoded != rows:
                    raise OSError(f"row group {group} holds {decoded} rows instead of {rows}")
        except self._unreadable as error:
            raise RequestError(
                f"{flag} {path} is a damaged Parquet file, or none: {_sentence(error)} Fetch the file again."
            ) from error
        if not len(self):
            raise RequestError(f"{flag} {path} holds no records; expected a Parquet file with rows.")

    def __len__(self) -> int:
        return self._starts[-1]

    def __getitem__(self, index: int) -> Any:
        index = range(len(self))[index]  # IndexError where there is none
        try:
            cursor = self._cursor_at(index)
        except self._unreadable as error:
            raise WorkError(f"{self.path} cannot be read any more: {_sentence(error)}") from error
        return cursor.batch.slice(index - cursor.start, 1).to_pylist()[0]

    def __iter__(self) -> Iterator[Any]:
        return (self[index] for index in range(len(self)))

    def digest(self) -> str:
        """sha256 of the file."""
        digest = hashlib.sha256()
        with self.path.open("rb") as file:
            while part := file.read(1 << 24):
                digest.update(part)
        return digest.hexdigest()

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


def _sentence(error: BaseException) -> str:
    return f"{' '.join(str(error).split()).rstrip('.')}."
