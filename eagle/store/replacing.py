"""How a store's new layout takes the place of the old one; it changes name as it advances:

    .reshard-building   being built; the old data are untouched; a rerun starts over
    .reshard-deleting   complete; the old files it names are being deleted (in place only)
    .reshard-moving     the old files are gone; its files are being moved to where they belong

Plans and folders come with stores, which come from anywhere: nothing is deleted or moved that is no file of a store.
"""

from __future__ import annotations

import shutil
from dataclasses import dataclass
from pathlib import Path

from eagle.errors import RequestError
from eagle.files import fsync_folder, read_json
from eagle.store.classic_dumps import is_dump_name
from eagle.store.manifest import DONE, INTERRUPTED_RESHARD, LOG, MANIFEST
from eagle.store.shard import is_shard_name

BUILDING, DELETING, MOVING = (".reshard-building", *INTERRUPTED_RESHARD)
PLAN = "plan.json"


@dataclass(frozen=True, slots=True)
class Part:
    """What one new folder got."""

    records: int
    tokens: int


def finish_replacing(new: Path) -> list[Part] | None:
    """Take a reshard that had finished building to its end. None where there is nothing to finish.

    Raises: RequestError for a plan or a file that no reshard made; then nothing was deleted or moved.
    """
    deleting, moving = new / DELETING, new / MOVING
    if deleting.is_dir():
        plan = _read_plan(deleting)
        _moves(deleting, new)  # what could not be moved later must not cost the old files
        old_files = [_own_file(name, new, deleting / PLAN) for name in plan["old_files"]]
        for file in old_files:
            file.unlink(missing_ok=True)
        _remove_emptied({file.parent for file in old_files}, new)
        deleting.rename(moving)
        fsync_folder(new)
    if not moving.is_dir():
        return None
    # The plan goes last: without it the parts could not be reported.
    summary = [Part(*part) for part in _read_plan(moving)["parts"]]
    moves = _moves(moving, new)
    for path, target in moves:
        target.parent.mkdir(exist_ok=True)
        path.replace(target)
    for folder in sorted({target.parent for _, target in moves}):
        fsync_folder(folder)
    moving.rename(new / BUILDING)  # nothing in it is needed any more
    shutil.rmtree(new / BUILDING)
    return summary


def _read_plan(work: Path) -> dict:
    """Raises: RequestError for a plan that a reshard did not write."""
    path = work / PLAN
    plan = read_json(path, "a reshard plan")
    names, parts = plan.get("old_files"), plan.get("parts")
    if not (
        isinstance(names, list)
        and all(isinstance(name, str) for name in names)
        and isinstance(parts, list)
        and all(isinstance(part, list) and [type(count) for count in part] == [int, int] for part in parts)
    ):
        raise RequestError(_foreign(path, "it does not hold the lists that a plan holds"))
    return plan


def _moves(work: Path, new: Path) -> list[tuple[Path, Path]]:
    """The files of a built layout, and where each belongs. Raises: RequestError for one that has no place there."""
    if work.is_symlink():
        raise RequestError(_foreign(work, "it is a link"))
    files = [path for path in sorted(work.rglob("*")) if path.is_symlink() or path.is_file()]
    return [(path, _own_file(str(path.relative_to(work)), new, path)) for path in files if path != work / PLAN]


def _own_file(name: str, root: Path, named_by: Path) -> Path:
    """The file of that relative name below a store. Plans and folders come with stores, which come from anywhere.

    Raises: RequestError for a name that leads out of the store, or that no store's file has.
    """
    path = Path(name)
    # A file of a store may be a link, which is then what is deleted or replaced; a folder on the way may lead nowhere
    # else.
    folder, whole = (root / path).parent.resolve(), root.resolve()
    if path.is_absolute() or ".." in path.parts or not (folder == whole or whole in folder.parents):
        raise RequestError(_foreign(named_by, f"{name!r} leads out of the folder"))
    if not (path.name in (MANIFEST, DONE, LOG) or is_shard_name(path.name) or is_dump_name(path.name)):
        raise RequestError(_foreign(named_by, f"{name!r} is no file of a store"))
    return root / path


def _foreign(path: Path, what: str) -> str:
    rest = path.parent if path.name == PLAN else path
    return (
        f"{path} was not made by reassign_data_num.py: {what}. Nothing was deleted or moved. If the store is somebody "
        f"else's, do not trust it; to go on with what it holds, delete {rest}."
    )


def _remove_emptied(folders: set[Path], root: Path) -> None:
    for folder in folders:
        while folder != root and folder.is_dir() and not any(folder.iterdir()):
            folder.rmdir()
            folder = folder.parent
