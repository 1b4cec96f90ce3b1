"""A process that this one starts ends with it, and so does what it started itself."""

from __future__ import annotations

import contextlib
import ctypes
import os
import signal
import subprocess
import threading
import time
from collections.abc import Callable, Iterator

import psutil

_PR_SET_PDEATHSIG = 1
#: Linux alone has it. Looked up here: a process that was just forked must not wait for the loader's lock.
_PRCTL = getattr(ctypes.CDLL(None), "prctl", None)
#: Python's process beside others that share memory, which takes it away when they have ended.
_TRACKER = "multiprocessing.resource_tracker"
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
    with contextlib.suppress(subprocess.TimeoutExpired):
        process.wait(seconds)
    _end_members(process.pid)
    process.wait()


def end_own_group() -> None:
    """End all others of the session that this process leads; what it does where its parent has died."""
    if os.getpgrp() == os.getpid():
        _end_members(os.getpid())


def _end_members(group: int) -> None:
    for how in (psutil.Process.terminate, psutil.Process.kill):
        for member in _members(group):
            with contextlib.suppress(psutil.Error):
                how(member)
        # Looked at, not waited for: that would take a child's exit code from who started it.
        until = time.monotonic() + _IN_ORDER
        while any(_members(group)) and time.monotonic() < until:
            time.sleep(0.05)


def _members(group: int) -> Iterator[psutil.Process]:
    """The others of a process group that still run."""
    for process in psutil.process_iter():
        with contextlib.suppress(psutil.Error, ProcessLookupError):
            if process.pid == os.getpid() or os.getpgid(process.pid) != group:
                continue
            if process.status() != psutil.STATUS_ZOMBIE and _TRACKER not in " ".join(process.cmdline()):
                yield process
