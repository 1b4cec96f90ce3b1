"""A process that this one starts ends with it, and so does what it started itself.

``python -m eagle.child COMMAND ...`` runs a command that knows nothing of this, until its own stdin closes (`run`).
"""

from __future__ import annotations

import atexit
import contextlib
import ctypes
import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import psutil

_PR_SET_PDEATHSIG = 1
#: Linux alone has it. Looked up here: a process that was just forked must not wait for the loader's lock.
_PRCTL = getattr(ctypes.CDLL(None), "prctl", None)
#: Python's process beside others that share memory, which takes it away when they have ended.
_TRACKER = "multiprocessing.resource_tracker"
#: Held while this process ends others.
_ending = threading.Lock()
#: Seconds to end in order; as long is waited for those that are killed then.
_IN_ORDER = 5


def die_with_parent() -> None:
    """As `preexec_fn` of a child that does not watch its stdin: on Linux it gets SIGTERM when the parent dies."""
    if _PRCTL is not None:
        _PRCTL(_PR_SET_PDEATHSIG, signal.SIGTERM)


def end_with_parent(clean_up: Callable[[], object] = lambda: None) -> None:
    """End this process when its stdin closes, which is when the parent dies, however it dies. clean_up: done before."""

    def watch() -> None:
        # Not sys.stdin: its lock, held by a waiting daemon thread, would abort the interpreter's own end.
        while os.read(0, 4096):
            pass
        try:
            clean_up()
        finally:
            os._exit(1)

    threading.Thread(target=watch, daemon=True).start()


def end_group(process: subprocess.Popen[bytes], seconds: float) -> None:
    """Give a process that leads its own session so long to end as it was told to; then nothing of it is left."""
    try:
        with contextlib.suppress(subprocess.TimeoutExpired):
            process.wait(seconds)
    finally:  # Ctrl-C may come twice
        _end_members(process.pid)
        process.kill()
        process.wait()


def run(words: Sequence[str], **options: Any) -> int:
    """Run a command to its end; its exit code. However this process ends, so does all that the command started.

    options: `subprocess.Popen`'s, but for its stdin, which is empty.
    """
    wrapped = [sys.executable, "-m", "eagle.child", *words]
    process = subprocess.Popen(wrapped, stdin=subprocess.PIPE, start_new_session=True, **options)
    try:
        return process.wait()
    finally:
        assert process.stdin
        process.stdin.close()
        end_group(process, 3 * _IN_ORDER)


def end_own_group() -> None:
    """End all others of the session that this process leads; what it does where its parent has died."""
    if os.getpgrp() == os.getpid():
        with _ending:
            _end_members(os.getpid())


@atexit.register
def _wait_for_that() -> None:
    """The main thread may end by the end of the first of them; the others are still to be ended then."""
    with _ending:
        pass


def _end_members(group: int) -> None:
    for how in (psutil.Process.terminate, psutil.Process.kill):
        until = time.monotonic() + _IN_ORDER
        told: set[psutil.Process] = set()
        # Looked at, not waited for: that would take a child's exit code from who started it.
        while (members := set(_members(group))) and time.monotonic() < until:
            for member in members - told:  # one may have been started meanwhile
                with contextlib.suppress(psutil.Error):
                    how(member)
            told |= members
            time.sleep(0.05)


def _members(group: int) -> Iterator[psutil.Process]:
    """The others of a process group that still run."""
    for process in psutil.process_iter():
        with contextlib.suppress(psutil.Error, ProcessLookupError):
            if process.pid == os.getpid() or os.getpgid(process.pid) != group:
                continue
            if process.status() != psutil.STATUS_ZOMBIE and _TRACKER not in " ".join(process.cmdline()):
                yield process


def main() -> int:
    end_with_parent(end_own_group)
    code = subprocess.run(sys.argv[1:], stdin=subprocess.DEVNULL, check=False).returncode
    return code if code >= 0 else 128 - code


if __name__ == "__main__":
    sys.exit(main())
