"""Random access to the records of an Arrow file, without loading it: what Hugging Face `datasets` keeps on disk.

Needs pyarrow. The file is memory-mapped; a row is decoded when it is asked for, in whichever process.
"""

from __future__ import annotations

from bisect import bisect_right
from itertools import accumulate
from pathlib import Path
from typing import Any

from eagle.data.record_file import RecordFile
from eagle.errors import RequestError

ARROW_SUFFIX = ".arrow"
#: How the file format begins, and how the stream format, which `datasets` writes, ends.
_MAGIC, _END = b"ARROW1", b"\xff\xff\xff\xff\0\0\0\0"


def is_arrow(path: Path) -> bool:
    """Whether a file is Arrow, by its name or by its first bytes."""
    if path.suffix.lower() == ARROW_SUFFIX:
        return True
    with path.open("rb") as file:
        return file.read(len(_MAGIC)) == _MAGIC


class ArrowFile(RecordFile):
    """Records of an Arrow file, by index, a row a record. Nested columns are lists and dicts; dates are left out.

    Raises: RequestError where pyarrow is missing, or the file is damaged or ends too early: every value is looked at
    once when it is opened.
    """

    def __init__(self, path: str | Path, *, flag: str = "--data_path") -> None:
        pyarrow = import_pyarrow(f"{flag} {path} is an Arrow file")
        self.path = Path(path)
        try:
            mapped = pyarrow.memory_map(str(path))
            is_file = mapped.read(len(_MAGIC)) == _MAGIC
            if not is_file:
                # A stream that ends between two of its batches reads like a whole one.
                mapped.seek(max(0, mapped.size() - len(_END)))
                if mapped.read() != _END:
                    raise OSError("it ends before its end mark")
            mapped.seek(0)
            options = pyarrow.ipc.IpcReadOptions(use_threads=False)
            reader = (pyarrow.ipc.open_file if is_file else pyarrow.ipc.open_stream)(mapped, options=options)
            columns = read_columns(reader.schema)
            table = reader.read_all()
            table = table if columns is None else table.select(columns)
            table.validate(full=True)
        except (pyarrow.ArrowException, OSError) as error:
            raise RequestError(
                f"{flag} {path} is a damaged Arrow file, or none: {sentence(error)} Fetch or save it again."
            ) from error
        self._batches = table.to_batches()
        self._starts = list(accumulate(map(len, self._batches), initial=0))

    def __len__(self) -> int:
        return self._starts[-1]

    def __getitem__(self, index: int) -> Any:
        index = range(len(self))[index]  # IndexError where there is none
        batch = bisect_right(self._starts, index) - 1
        return record_of(self._batches[batch].slice(index - self._starts[batch], 1))


def import_pyarrow(what: str) -> Any:
    """pyarrow and its readers. what: the file that needs it. Raises: RequestError."""
    try:
        import pyarrow
        import pyarrow.ipc
    except ImportError as error:
        raise RequestError(
            f"{what}, and pyarrow, which reads those, cannot be imported here ({error}); pip install pyarrow "
            "('pyarrow<24' beside numpy 1.x), or give the records as JSON Lines."
        ) from error
    return pyarrow


def read_columns(schema: Any) -> list[str] | None:
    """The columns to read: all (None), or all but those of dates and times, which a record says nothing in."""
    import pyarrow

    temporal = {field.name for field in schema if pyarrow.types.is_temporal(field.type)}
    return [name for name in schema.names if name not in temporal] if temporal else None


def record_of(row: Any) -> Any:
    """The record of a batch of one row. Raises: ValueError where a text of it is not UTF-8."""
    try:
        return row.to_pylist()[0]
    except UnicodeDecodeError:
        raise
    except (ValueError, OverflowError):
        # A time inside of a column, for which Python has no form.
        import pyarrow

        columns = [column.cast(_with_plain_times(column.type)) for column in row.columns]
        return pyarrow.RecordBatch.from_arrays(columns, row.schema.names).to_pylist()[0]


def _with_plain_times(kind: Any) -> Any:
    """A type whose dates and times, however deep in it, are numbers."""
    import pyarrow
    from pyarrow import types

    if types.is_temporal(kind):
        return {32: pyarrow.int32(), 64: pyarrow.int64()}.get(kind.bit_width, kind)
    if types.is_struct(kind):
        fields = (kind.field(at) for at in range(kind.num_fields))
        return pyarrow.struct([(field.name, _with_plain_times(field.type)) for field in fields])
    if types.is_map(kind):
        return pyarrow.map_(_with_plain_times(kind.key_type), _with_plain_times(kind.item_type))
    if types.is_fixed_size_list(kind):
        return pyarrow.list_(_with_plain_times(kind.value_type), kind.list_size)
    if types.is_large_list(kind):
        return pyarrow.large_list(_with_plain_times(kind.value_type))
    if types.is_list(kind):
        return pyarrow.list_(_with_plain_times(kind.value_type))
    return kind


def sentence(error: BaseException) -> str:
    """What an error of pyarrow says, in one line."""
    return f"{' '.join(str(error).split()).rstrip('.')}."
