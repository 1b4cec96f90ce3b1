"""The files of a store: finished shards and classic dumps, wherever they lie below a folder."""

from __future__ import annotations

import os
from pathlib import Path

from eagle.store.classic_dumps import is_dump_name
from eagle.store.damage import exhausted
from eagle.store.manifest import INTERRUPTED_RESHARD, interrupted
from eagle.store.shard import is_shard_name


def find_files(root: Path, flag: str) -> tuple[list[Path], list[Path]]:
    """The finished shards and the dumps below a folder, both sorted, but for what hidden folders hold.

    Shards in there are not finished, and dumps are somebody's who put them away. A folder may be a link: step 3 goes on
    in one that was moved to another disk. flag: what named the folder.

    Raises: RequestError where a reshard of one of the folders was interrupted, some of whose records are in a hidden
    one; OSError for a folder that cannot be listed.
    """
    shards, dumps = [], []
    seen = set()
    for name, folders, files in os.walk(root, onerror=_refuse, followlinks=True):
        folder = Path(name)
        status = folder.stat()
        if (status.st_dev, status.st_ino) in seen:  # a link to what is there already, or round in a circle
            folders.clear()
            continue
        seen.add((status.st_dev, status.st_ino))
        if not {*INTERRUPTED_RESHARD}.isdisjoint(folders):
            raise interrupted(root, flag, folder)
        folders[:] = (one for one in folders if not one.startswith("."))
        shards += [folder / file for file in files if is_shard_name(file)]
        dumps += [folder / file for file in files if is_dump_name(file)]
    return sorted(shards), sorted(dumps)


def _refuse(error: OSError) -> None:
    """A folder that cannot be listed must not go missing in silence, but for those of others (lost+found)."""
    if isinstance(error, PermissionError):
        return
    raise exhausted(error, Path(error.filename)) or error
