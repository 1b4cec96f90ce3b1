"""The folder of a job while it runs: made, locked and claimed; and left as it was by a job that made nothing."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from eagle.data.tokens import TOKENS
from eagle.files import LOCK, locked, output_folder
from eagle.generate.dealing import LEFT, forget_done, has_shards, worker_folders
from eagle.generate.job import Job, claim_outdir
from eagle.store.manifest import LOG, MANIFEST

FLAG = "--outdir"
#: Seconds that a killed job's workers get to end by themselves, which they do as soon as the disk lets them.
PATIENCE = 15


@contextmanager
def claimed(job: Job) -> Iterator[int]:
    """Hold the folder for this job; yields the file descriptor by which its workers hold it too.

    Where the job fails before its first shard, the folder is as it was before, so that a corrected command, whose
    options are others, can run in it at once.

    Raises: RequestError where the folder cannot be written to, is in use, or holds something else.
    """
    folder = job.request.folder
    new = [path for path in (folder, *folder.parents) if not path.exists()]  # the deepest first
    is_locked = (folder / LOCK).exists()
    try:
        output_folder(folder, FLAG)
        with locked(folder, FLAG, PATIENCE) as lock:
            claim_outdir(job)
            try:
                yield lock
            except BaseException:
                if not has_shards(folder):
                    _forget(folder, keep_lock=is_locked)
                raise
    except BaseException:
        with contextlib.suppress(OSError):  # the first that is not empty ends it
            for path in new:
                path.rmdir()
        raise


def _forget(folder: Path, *, keep_lock: bool) -> None:
    """Take away what a job without a shard has in its folder."""
    forget_done(folder)
    for part in worker_folders(folder):
        (part / LOG).unlink(missing_ok=True)
        with contextlib.suppress(OSError):  # it holds something of somebody else's
            part.rmdir()
    for name in (TOKENS, LEFT, MANIFEST, LOCK):
        if name != LOCK or not keep_lock:
            for file in (folder / name, folder / f"{name}.tmp", folder / f".{name}.tmp"):
                file.unlink(missing_ok=True)
