"""Processes that end without warning at a chosen moment, as a kill -9 would end them.

They are forked from a server that has everything imported, so that dozens of them cost seconds.
"""

from __future__ import annotations

import multiprocessing
import os
import sys
from multiprocessing.process import BaseProcess

KILLED = 9

#: Python reports these just before it does them (https://docs.python.org/3/library/audit_events.html).
_CHANGES = {"os.rename", "os.remove", "os.link", "os.symlink", "os.mkdir", "os.rmdir", "os.truncate", "shutil.rmtree"}
_WRITING = os.O_WRONLY | os.O_RDWR | os.O_CREAT

#: A process has one such server, which the tests share.
context = multiprocessing.get_context("forkserver")
context.set_forkserver_preload(
    ["reassign_data_num", "eagle.store.reshard", "eagle.train.main", "eagle.regenerate.main"]
)


def reshard(words: list[object], moment: int = 0) -> BaseProcess:
    """Start ``reassign_data_num.py``; it ends before its `moment`-th change to the file system (0: never)."""
    process = context.Process(target=_reshard, args=([str(word) for word in words], moment))
    process.start()
    return process


def regenerate(words: list[object]) -> BaseProcess:
    """Start ``tools/regenerate.py``."""
    process = context.Process(target=_regenerate, args=([str(word) for word in words],))
    process.start()
    return process


def _regenerate(words: list[str]) -> None:
    from eagle.regenerate import main

    os.dup2(os.open(os.devnull, os.O_WRONLY), 1)
    os._exit(main.main(words))


def _reshard(words: list[str], moment: int) -> None:
    from eagle.store import reshard as reassign_data_num

    os.dup2(os.open(os.devnull, os.O_WRONLY), 1)
    os.fsync = lambda descriptor: None  # what a killed process wrote is there; syncing is against power cuts
    changes = 0

    def before(event: str, arguments: tuple) -> None:
        nonlocal changes
        writes = event == "open" and isinstance(arguments[2], int) and arguments[2] & _WRITING
        if event in _CHANGES or writes:
            changes += 1
            if changes == moment:
                os._exit(KILLED)

    sys.addaudithook(before)
    code = reassign_data_num.main(words)
    os._exit(code)
