"""Processes that end without warning at a chosen moment, as a kill -9 would end them.

They are forked from a server that has everything imported, so that dozens of them cost seconds.
"""

from __future__ import annotations

import multiprocessing
import os
import signal
import sys
from multiprocessing.process import BaseProcess
from typing import NoReturn

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


def train_and_die(words: list[object], where: str, count: int) -> None:
    """Train in a process that kills itself at optimizer step `count` ("step"), while the checkpoint of it is written
    ("saving"), or before that is pointed at ("pointing")."""
    process = context.Process(target=_train_and_die, args=([str(word) for word in words], where, count))
    process.start()
    process.join(120)
    assert process.exitcode == -signal.SIGKILL


def _train_and_die(words: list[str], where: str, count: int) -> None:
    import torch

    from eagle.train import checkpoint, loop, main

    torch.set_num_threads(1)
    step, write_json, point = loop.Trainer._step, checkpoint.write_json, checkpoint.point

    def die() -> NoReturn:
        os.kill(os.getpid(), signal.SIGKILL)
        raise AssertionError

    def dying_step(self, *rest):
        return die() if self.position.step == count else step(self, *rest)

    def dying_write(path, content):
        return die() if content.get("step") == count else write_json(path, content)

    def dying_point(folder, pointer, name):
        return die() if name == f"state_{count}" else point(folder, pointer, name)

    if where == "step":
        loop.Trainer._step = dying_step
    elif where == "saving":
        checkpoint.write_json = dying_write
    else:
        checkpoint.point = dying_point
    main.main(words)
