"""Paths that a user names, folders held by one process, and small files that are whole or absent."""

from __future__ import annotations

import errno
import json
import os
import stat
import sys
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from eagle.errors import RequestError

#: The folder that holds the package: what a child process needs on its path, wherever it was started.
ROOT = Path(__file__).resolve().parents[1]
LOCK = ".lock"
#: How the file begins that git keeps in place of a large one (https://github.com/git-lfs/git-lfs/blob/main/docs/spec.md).
_LFS = b"version https://git-lfs.github.com/spec/v1"


def existing_path(path: str | Path, flag: str, kind: str = "path") -> Path:
    """`path` as a Path, or FileNotFoundError that names the flag. `kind`: 'path', 'file' or 'folder'."""
    path = Path(path)
    what = {"path": "a file or folder", "file": "a file", "folder": "a folder"}[kind]
    if not path.exists():
        raise FileNotFoundError(f"{flag} {path}: no such file or folder; expected {what}. Check the path.")
    if (kind == "file" and not path.is_file()) or (kind == "folder" and not path.is_dir()):
        seen = named_kind(path)
        pipe = ". It is a pipe, which can be read once only: write it to a file first" if seen == "a pipe" else ""
        raise RequestError(f"{flag} {path} is not {what}, which is what this flag takes{pipe}.")
    return path


def named_kind(path: Path) -> str:
    """What is there, in words: a file, a folder, a pipe (what a shell's ``<(...)`` makes), ..."""
    mode = path.stat().st_mode
    kinds = {stat.S_ISREG: "a file", stat.S_ISDIR: "a folder", stat.S_ISFIFO: "a pipe", stat.S_ISSOCK: "a socket"}
    return next((name for is_kind, name in kinds.items() if is_kind(mode)), "a device")


def output_folder(path: Path, flag: str) -> None:
    """Make the folder where there is none yet, and see that files can be made in it.

    Raises: RequestError where they cannot; OSError for a full disk.
    """
    try:
        path.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryFile(dir=path):
            pass
    except OSError as error:
        if error.errno == errno.ENOSPC:
            raise
        raise RequestError(
            f"{flag} {path} cannot be written to: {error.strerror}. Nothing was written or changed. Name a folder in "
            "which you may make files."
        ) from error


def check_output_file(path: Path, *, overwrite: bool) -> None:
    """Whether ``--output`` may be written. Raises: RequestError for a folder, or a file that exists, unless told."""
    if path.is_dir():
        raise RequestError(f"--output {path} is a folder; expected the name of a file.")
    if path.exists() and not overwrite:
        raise RequestError(f"--output {path} exists. Name another file, or pass --overwrite to replace it.")


@contextmanager
def locked(folder: Path, flag: str, patience: float = 0) -> Iterator[int]:
    """Hold the folder for this process, and for those to which it passes the file descriptor that this yields: the last
    of them to end gives it up.

    patience: how many seconds to wait, with a word on stderr, for processes that outlive the one that took it.

    Raises: RequestError while another process holds it.
    """
    import fcntl  # not on Windows, where the other steps do work

    path, deadline, told = folder / LOCK, time.monotonic() + patience, False
    while True:
        with path.open("w") as file:
            try:
                fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError as error:
                if time.monotonic() >= deadline:
                    killed = ", or by processes that one left when it was killed" if patience else ""
                    raise RequestError(
                        f"{flag} {folder} is in use by another running job{killed}; wait for it or end it."
                    ) from error
                if not told:
                    print(f"note: {folder} is in use, waiting up to {patience:.0f} s for it", file=sys.stderr)
                told = True
                time.sleep(0.1)
                continue
            except OSError:
                pass  # a file system without locks: two jobs at once are then the user's to avoid
            if told and os.fstat(file.fileno()).st_nlink == 0 and time.monotonic() < deadline:
                continue  # who held it took the file away, and the next one to come would lock another
            yield file.fileno()
            return


def write_json(path: Path, content: object) -> None:
    """Write JSON so that a reader sees the old file or the new one, never half of one."""
    temporary = path.with_name(f".{path.name}.tmp")
    with temporary.open("w", encoding="utf-8") as file:
        json.dump(content, file, indent=2, ensure_ascii=False)
        file.write("\n")
        file.flush()
        os.fsync(file.fileno())
    temporary.replace(path)
    fsync_folder(path.parent)


def fsync_folder(folder: Path) -> None:
    """Make a rename in `folder` survive a power cut. A no-op where folders cannot be opened (Windows)."""
    try:
        descriptor = os.open(folder, os.O_RDONLY)
    except OSError:
        return
    try:
        os.fsync(descriptor)
    except OSError:
        # Object stores mounted as file systems refuse fsync on folders; their renames are durable anyway.
        pass
    finally:
        os.close(descriptor)


def check_no_pointer(path: Path) -> None:
    """Raises: RequestError for what git leaves in place of a large file where git-lfs did not fetch it."""
    with path.open("rb") as file:
        is_pointer = file.read(len(_LFS)) == _LFS
    if is_pointer:
        raise RequestError(
            f"{path} is a git-lfs pointer, a few lines of text in place of the real file. Run 'git lfs pull' in its "
            "folder, or fetch the folder again with 'hf download'."
        )


def read_json(path: Path, what: str) -> dict:
    """The JSON object in `path`, or a RequestError that says what the file should have been."""
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except (ValueError, UnicodeDecodeError) as error:
        raise RequestError(f"{path} should be {what}, but is not valid JSON: {error}.") from error
    if not isinstance(content, dict):
        raise RequestError(f"{path} should be {what}, a JSON object, but holds a {type(content).__name__}.")
    return content
