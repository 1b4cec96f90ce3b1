"""Appends records to the numbered shards of one folder."""

from __future__ import annotations

from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path

from eagle.store.dtypes import SAME
from eagle.store.record import Record, StoredRecord
from eagle.store.shard import shard_name, shard_number, shard_paths, write_shard

#: A shard is closed once it holds this much. Large enough that 68k conversations are a few thousand files,
#: small enough that a killed worker loses minutes, not hours.
SHARD_BYTES = 128 << 20
#: As many shards are enough for one folder: where more would be written, they become larger, but not larger than this,
#: for a writer holds two of them in memory.
ENOUGH_SHARDS, MOST_SHARD_BYTES = 2000, 1 << 30


def shard_bytes_for(total: int) -> int:
    """The size of a folder's shards, in whole MiB, where it is to hold `total` bytes of features."""
    mib = -(-total // (ENOUGH_SHARDS << 20))  # rounded up
    return min(max(SHARD_BYTES, mib << 20), MOST_SHARD_BYTES)


class ShardWriter:
    """Appends records to the numbered shards of one folder.

    Every finished shard carries `progress`, the caller's own JSON string, as it was when the shard was closed:
    a resumed caller reads it back from `Shard.progress`. The caller decides when a shard may be closed, since
    only it knows where its work can be taken up again.

    first: the number of the first shard; default: behind those that are there.

    background: write in a thread, one shard at a time; what goes wrong is raised by the next call or by `wait`.

    Raises: OSError (read-only), WorkError (disk full); what was finished before stays whole.
    """

    def __init__(
        self,
        folder: Path,
        *,
        shard_bytes: int = SHARD_BYTES,
        store_dtype: str = SAME,
        background: bool = False,
        first: int | None = None,
    ) -> None:
        self.folder = folder
        self.shard_bytes, self.store_dtype = shard_bytes, store_dtype
        self._pool = ThreadPoolExecutor(1, "writer") if background else None
        self._writing: Future[None] | None = None
        self._records: list[StoredRecord] = []
        self._bytes = 0
        folder.mkdir(parents=True, exist_ok=True)
        for leftover in folder.glob(".shard-*.tmp"):
            leftover.unlink()
        behind = max((shard_number(path) + 1 for path in shard_paths(folder)), default=0)
        self._next = behind if first is None else first

    def add(self, record: Record | StoredRecord) -> None:
        stored = record.stored(self.store_dtype) if isinstance(record, Record) else record
        self._records.append(stored)
        self._bytes += stored.feature_bytes

    @property
    def is_full(self) -> bool:
        return self._bytes >= self.shard_bytes

    def close_shard(self, progress: str = "{}") -> None:
        """Write the records gathered so far as one shard; none gathered, none written."""
        if not self._records:
            return
        self.wait()
        path, records = self.next_path(), self._records
        self._records, self._bytes = [], 0
        if self._pool:
            self._writing = self._pool.submit(write_shard, path, records, progress)
        else:
            write_shard(path, records, progress)

    def next_path(self) -> Path:
        """Where the next shard belongs, for a caller that has a whole one to put there."""
        self._next += 1
        return self.folder / shard_name(self._next - 1)

    def wait(self) -> None:
        """Until every closed shard is on the disk."""
        if self._writing:
            self._writing.result()
            self._writing = None
