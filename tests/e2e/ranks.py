"""Ranks of a training run started one by one, as on machines of their own: each with its own command.

They are forked from a server that has everything imported (`tests.e2e.killed`), so that a group is there in a second.
"""

from __future__ import annotations

import os
import signal
import socket
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from multiprocessing.process import BaseProcess
from pathlib import Path

import torch

from tests.e2e.killed import context

#: Seconds after which a test gives up on a rank.
PATIENCE = 120.0

#: What accelerate's launcher sets for configs/fsdp.yaml that decides something.
FSDP = {"ACCELERATE_USE_FSDP": "true", "FSDP_VERSION": "2"}


@dataclass(frozen=True, slots=True)
class Rank:
    """A running rank. folder: what it says is there."""

    process: BaseProcess
    folder: Path

    def wait(self) -> int:
        """Its exit code; negative for a signal. A rank that hangs is killed, and fails the test."""
        self.process.join(PATIENCE)
        if self.process.is_alive():
            self.process.kill()
            raise AssertionError(f"it hangs: {self.said}")
        assert self.process.exitcode is not None
        return self.process.exitcode

    @property
    def said(self) -> str:
        """On stderr, without line breaks, which depend on the lengths of paths."""
        return " ".join((self.folder / "err").read_text().split())

    @property
    def out(self) -> str:
        return (self.folder / "out").read_text()


def start_ranks(
    folder: Path,
    commands: Sequence[Sequence[object]],
    dies: Mapping[int, int] | None = None,
    by: int = signal.SIGKILL,
    tick: float | None = None,
    missing: int = 0,
    variables: Mapping[str, str] | None = None,
    of_rank: Mapping[int, Mapping[str, str]] | None = None,
    one_machine: bool = False,
) -> list[Rank]:
    """Start a rank with each of these options. dies: rank to step, behind which it sends itself the signal `by`.

    tick: seconds between the ranks' beats, where that is not to be the real one. missing: further ranks of the group,
    which do not come; the others then wait two seconds. variables: of their environment, beside what a launcher sets;
    of_rank: of one rank's alone.
    """
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    ranks = []
    for number, words in enumerate(commands):
        own = folder / f"rank{number}"
        own.mkdir(parents=True)
        # One process of every "machine" says what is wrong, so all of these do.
        place: dict[str, object] = {"RANK": number, "WORLD_SIZE": len(commands) + missing, "LOCAL_RANK": 0}
        place |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port}
        if one_machine:
            place |= {"LOCAL_RANK": number, "LOCAL_WORLD_SIZE": len(commands)}
        environment = {name: str(value) for name, value in place.items()} | dict(variables or {})
        environment |= (of_rank or {}).get(number, {})
        dies_at, time_to_meet = (dies or {}).get(number), 2.0 if missing else None
        arguments = ([str(word) for word in words], environment, own, dies_at, by, tick, time_to_meet)
        process = context.Process(target=_train, args=arguments)
        process.start()
        ranks.append(Rank(process, own))
    return ranks


def _train(
    words: list[str], environment: dict[str, str], folder: Path, dies_at: int | None, by: int, tick: float | None,
    time_to_meet: float | None,
) -> None:  # fmt: skip
    from eagle.entry import run
    from eagle.train import group, main, watch
    from eagle.train.run_log import RunLog

    for name, descriptor in (("out", 1), ("err", 2)):
        os.dup2(os.open(folder / name, os.O_WRONLY | os.O_CREAT), descriptor)
    signal.signal(signal.SIGINT, signal.default_int_handler)  # the server ignores it
    os.environ.update(environment)
    torch.set_num_threads(1)
    watch.TICK, group.TIME_TO_MEET = tick or watch.TICK, time_to_meet or group.TIME_TO_MEET
    step = RunLog.step

    def last_step(self: RunLog, number: int, *rest: object) -> None:
        step(self, number, *rest)  # type: ignore[arg-type]
        if number == dies_at:
            os.kill(os.getpid(), by)
            time.sleep(PATIENCE)  # as in a collective: the run must not be done before the signal is seen

    RunLog.step = last_step  # type: ignore[method-assign]
    main.leave(run(lambda: main.main(words)))
