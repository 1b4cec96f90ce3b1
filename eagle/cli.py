"""What every command line shares: exit codes, error messages, progress, locks, atomic small files.

Exit codes: 0 done; 1 the work failed; 2 the request is wrong; 130 interrupted.
"""

from __future__ import annotations

import argparse
import errno
import json
import os
import platform
import subprocess
import sys
import tempfile
import textwrap
import traceback
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from tqdm import tqdm

LOCK = ".lock"


class RequestError(ValueError):
    """The user asked for something that cannot be done. Says the value, what was expected and the fix."""


class WorkError(RuntimeError):
    """Work had begun and failed: a worker died, the disk filled up, a file is damaged."""


def run(main: Callable[[], int]) -> int:
    """Call `main` and turn its exceptions into one paragraph on stderr and an honest exit code.

    Anything that is not a `RequestError`, a missing file, an operating-system error or a `WorkError` is a
    bug of ours and keeps its traceback. ``EAGLE_DEBUG=1`` shows every traceback.
    """
    try:
        return main()
    except KeyboardInterrupt:
        print("\ninterrupted", file=sys.stderr)
        return 130
    except (RequestError, FileNotFoundError, FileExistsError, NotADirectoryError) as error:
        return _report(error, 2)
    except OSError as error:
        return _report(error, 1)
    except WorkError as error:
        return _report(error, 1)


def _report(error: Exception, code: int) -> int:
    if os.environ.get("EAGLE_DEBUG") == "1":
        traceback.print_exc()
    if code == 2 and os.environ.get("LOCAL_RANK", "0") != "0":
        return code  # every process of the machine refuses the same request; one says so
    message = str(error)
    if isinstance(error, OSError) and error.errno is not None:  # the system's own words name no fix
        fix = "Check this path, and what you may do there."
        if error.errno == errno.ENOSPC:
            fix = "What was finished is kept; free some space and run again."
        message = f"{error.filename or 'Writing failed'}: {error.strerror}. {fix}"
    # A child's last words come as several lines; only our own prose is wrapped.
    if "\n" not in message:
        message = textwrap.fill(message, 100, break_long_words=False, break_on_hyphens=False)
    print(f"error: {message}", file=sys.stderr)
    return code


class HelpFormatter(argparse.ArgumentDefaultsHelpFormatter):
    """Shows every default that is a value; where it is None the help text itself says what happens."""

    def _get_help_string(self, action: argparse.Action) -> str | None:
        return action.help if action.default in (None, False) else super()._get_help_string(action)


def existing_path(path: str | Path, flag: str, kind: str = "path") -> Path:
    """`path` as a Path, or FileNotFoundError that names the flag. `kind`: 'path', 'file' or 'folder'."""
    path = Path(path)
    what = {"path": "a file or folder", "file": "a file", "folder": "a folder"}[kind]
    if not path.exists():
        raise FileNotFoundError(f"{flag} {path}: no such file or folder; expected {what}. Check the path.")
    if (kind == "file" and not path.is_file()) or (kind == "folder" and not path.is_dir()):
        raise RequestError(f"{flag} {path} is not {what}, which is what this flag takes.")
    return path


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


@contextmanager
def locked(folder: Path, flag: str) -> Iterator[None]:
    """Hold the folder for this process. Raises: RequestError while another process holds it."""
    import fcntl  # not on Windows, where the other steps do work

    with (folder / LOCK).open("w") as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError as error:
            raise RequestError(f"{flag} {folder} is in use by another running job; wait for it or end it.") from error
        except OSError:
            pass  # a file system without locks: two jobs at once are then the user's to avoid
        yield


class _LogLines:
    """A stream for tqdm that turns its redrawn line into lines of their own, as a log file wants them."""

    def write(self, text: str) -> None:
        if text.strip():
            sys.stderr.write(text.strip() + "\n")

    def flush(self) -> None:
        sys.stderr.flush()


def progress_bar(total: int, unit: str, **options: Any) -> tqdm:
    """A live bar on a terminal; elsewhere a line every half minute."""
    from tqdm import tqdm

    if not sys.stderr.isatty():
        words = "{percentage:3.0f}% {n_fmt}/{total_fmt} [{elapsed}<{remaining}, {rate_fmt}{postfix}]"
        options |= {"file": _LogLines(), "mininterval": 30, "maxinterval": 30, "bar_format": words}
    return tqdm(total=total, unit=unit, **{"mininterval": 0.5, **options})


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


def read_json(path: Path, what: str) -> dict:
    """The JSON object in `path`, or a RequestError that says what the file should have been."""
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except (ValueError, UnicodeDecodeError) as error:
        raise RequestError(f"{path} should be {what}, but is not valid JSON: {error}.") from error
    if not isinstance(content, dict):
        raise RequestError(f"{path} should be {what}, a JSON object, but holds a {type(content).__name__}.")
    return content


def provenance() -> dict[str, object]:
    """What made an artefact: command line, versions and the commit, to be stored beside it."""
    import accelerate
    import torch
    import transformers

    from eagle import __version__

    return {
        "argv": sys.argv,
        "eagle": __version__,
        "commit": _git_commit(),
        "python": platform.python_version(),
        "torch": torch.__version__,
        "transformers": transformers.__version__,
        "accelerate": accelerate.__version__,
    }


def _git_commit() -> str | None:
    root = Path(__file__).resolve().parent.parent
    if not (root / ".git").exists():
        return None
    try:
        result = subprocess.run(
            ["git", "rev-parse", "HEAD"], cwd=root, capture_output=True, text=True, timeout=5, check=False
        )
    except OSError:
        return None
    return result.stdout.strip() if result.returncode == 0 else None
