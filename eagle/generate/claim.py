"""The folder of a job while it runs: made, locked and claimed; and left as it was by a job that made nothing."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from eagle.data.tokens import TOKENS
from eagle.files import LOCK, locked, output_folder
from eagle.generate.job import Job, claim_outdir
from eagle.store.manifest import DONE, LOG, MANIFEST
from eagle.store.shard import shard_paths

FLAG = "--outdir"


@contextmanager
def claimed(job: Job) -> Iterator[None]:
    """Hold the folder for this job. Where the job fails before its first shard, the folder is as it was before.

    So a corrected command, whose options are others, can run in it at once.

    Raises: RequestError where the folder cannot be written to, is in use, or holds something else.
    """
    folder = job.request.folder
    new = [path for path in (folder, *folder.parents) if not path.exists()]  # the deepest first
    is_locked = (folder / LOCK).exists()
    try:
        output_folder(folder, FLAG)
        with locked(folder, FLAG):
            claim_outdir(job)
            try:
                yield
            except BaseException:
                if not made_something(job):
                    _forget(job, keep_lock=is_locked)
                raise
    except BaseException:
        with contextlib.suppress(OSError):  # the first that is not empty ends it
            for path in new:
                path.rmdir()
        raise


def made_something(job: Job) -> bool:
    """Whether the job has a finished shard."""
    return any(shard_paths(_part(job, number)) for number in range(len(job.groups)))


def _part(job: Job, number: int) -> Path:
    return job.request.folder / str(number)


def _forget(job: Job, *, keep_lock: bool) -> None:
    """Take away what a job without a shard has in its folder."""
    folder = job.request.folder
    for number in range(len(job.groups)):
        part = _part(job, number)
        for file in (part / DONE, part / f".{DONE}.tmp", part / LOG, *part.glob(".shard-*.tmp")):
            file.unlink(missing_ok=True)
        with contextlib.suppress(OSError):  # it was never made, or holds something of somebody else's
            part.rmdir()
    for name in (TOKENS, f"{TOKENS}.tmp", MANIFEST, f".{MANIFEST}.tmp", *([] if keep_lock else [LOCK])):
        (folder / name).unlink(missing_ok=True)
