"""The processes of one training run: they meet, begin together or not at all, and end together (`eagle.train.watch`).

What they tell each other before they train goes through the store by which they met, and not through collectives: it
takes what time it takes, and works where something is wrong with one of them. Rank 0 judges, all raise the same error.
"""

from __future__ import annotations

import contextlib
import datetime
import json
import os
import random
import socket
import sys
import threading
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any, TypeVar

import torch
from accelerate import PartialState

from eagle import device
from eagle.errors import RequestError, WorkError
from eagle.progress import is_first_here
from eagle.releases import let_cpus_be_set
from eagle.train.agreement import disagreement, remarks
from eagle.train.launch_check import GROUP_SIZE, check_mode
from eagle.train.watch import Ending, Keys, Watch, last_words

Value = TypeVar("Value")

#: Seconds in which all processes of a group have to come: machines that a scheduler starts one by one take minutes.
TIME_TO_MEET = 600.0
#: For rank 0, which solves the closed form or writes to a slow disk; a process that is lost the watch finds by itself.
LONGEST_WAIT = datetime.timedelta(hours=2)
#: Seconds that a process which cannot begin waits for what the others say, which may be the same.
TIME_TO_SAY = 3.0
#: What a refused process says; other exceptions are bugs and keep their traceback.
_REFUSALS = (RequestError, WorkError, OSError, SystemExit)


class Group:
    """The processes of this run as one of them sees it. Without `watch` and `store` it is alone."""

    def __init__(self, watch: Watch | None = None, store: Keys | None = None) -> None:
        self._watch, self._store = watch, store
        self._rounds = 0

    def ready(self, work: Callable[[], Value]) -> Value:
        """What `work` returns, once it has come to its end in every process.

        Raises: what it raises here, where it fails everywhere; the first rank's error in all processes, where it fails
        in some.
        """
        if self._watch is None:
            return work()
        value, own, said = None, None, {}
        try:
            value = work()
        except (Exception, SystemExit) as error:
            if isinstance(error, SystemExit) and not error.code:  # --help
                raise
            own, (code, words) = error, last_words(error)
            said = {"code": code, "words": words}
        first = self._agree(said, _first_failure, own)
        if own is not None and (first["everywhere"] or not isinstance(own, _REFUSALS)):
            raise own
        if first:
            ending = Ending(first["rank"], first["host"], first["code"], first["words"])
            raise ending.error() from own
        return value  # type: ignore[return-value]

    def compare(self, see: Callable[[], Mapping[str, Any]]) -> list[str]:
        """Compare what `eagle.train.agreement.describe` tells of this process with the others'; notes for people.

        see: tells it, which reads much; not asked where there is nobody to compare with.

        Raises: RequestError, the same in all processes, where a rank differs from rank 0.
        """
        if self._watch is None:
            return []
        said = {"host": self._watch.host, **see()}
        found = self._agree(said, lambda all_: {"error": disagreement(all_), "notes": remarks(all_)})
        if found["error"]:
            raise RequestError(found["error"])
        return found["notes"]

    def gather(self, value: Any) -> list[tuple[str, Any]]:
        """The machine and the value of every process, by rank; values are JSON's."""
        if self._watch is None:
            return [("", value)]
        found = self._agree({"value": value}, lambda all_: {"found": [[one["host"], one["value"]] for one in all_]})
        return [(host, one) for host, one in found["found"]]

    def _agree(
        self, said: dict[str, Any], judge: Callable[[list[dict[str, Any]]], dict[str, Any]],
        own: BaseException | None = None,
    ) -> dict[str, Any]:  # fmt: skip
        """What `judge` makes, on rank 0, of what every process said. Raises `own` where others are still at work."""
        watch, store = self._watch, self._store
        assert watch and store
        number, self._rounds = self._rounds, self._rounds + 1
        watch.raises_itself = True
        try:
            store.set(f"said/{number}/{watch.rank}", json.dumps({"host": watch.host, **said}))
            store.add(f"said/{number}", 1)
            if watch.rank == 0:
                self._wait(lambda: store.add(f"said/{number}", 0) == watch.size, own)
                found = [json.loads(store.get(f"said/{number}/{rank}") or "{}") for rank in range(watch.size)]
                store.set(f"verdict/{number}", json.dumps(judge(found)))
            self._wait(lambda: store.get(f"verdict/{number}") is not None, own)
            return json.loads(store.get(f"verdict/{number}") or "{}")
        except WorkError:
            raise
        except RuntimeError as error:  # the store is gone with rank 0, which may have ended by what this one said
            raise own or WorkError(
                f"rank 0 has ended, and with it the store by which the group met ({error}). Its own output says why."
            ) from error
        finally:
            watch.raises_itself = False

    def _wait(self, is_so: Callable[[], bool], own: BaseException | None) -> None:
        assert self._watch
        started, pause = time.monotonic(), 0.01
        while not is_so():
            if self._watch.ended:
                raise own or self._watch.ended.error()
            if own is not None and time.monotonic() > started + TIME_TO_SAY:
                raise own
            time.sleep(pause)
            pause = min(2 * pause, 0.5)


def _first_failure(said: list[dict[str, Any]]) -> dict[str, Any]:
    """Of what every rank says of a piece of work: the first one that failed, and whether all did; empty where none."""
    failed = [rank for rank, one in enumerate(said) if "code" in one]
    return {"rank": failed[0], "everywhere": len(failed) == len(said), **said[failed[0]]} if failed else {}


@contextmanager
def meet(environment: Mapping[str, str] = os.environ) -> Iterator[Group]:
    """The group that a launcher started this process for. Within, no process outlives another's failure.

    Raises: RequestError, WorkError where the processes do not come together.
    """
    let_cpus_be_set()
    asked = [int(environment[name]) for name in GROUP_SIZE if environment.get(name, "").isdigit()]
    if max(asked, default=1) == 1:
        yield Group()
        return
    with _in_time(max(asked)):
        state = _join()
        alone = state.num_processes == 1
        prefix = "" if alone else _prefix(state)
    if alone:
        yield Group()
        return
    if missing := [name for name in ("MASTER_ADDR", "MASTER_PORT") if name not in os.environ]:
        raise RequestError(
            f"{_where()} came to a group, but its launcher did not set {' and '.join(missing)}. Set them for every "
            "process: the address of rank 0's machine, and a free port of it. There they tell each other of failures."
        )
    store = Keys(_client(keeps=state.process_index == 0), prefix)
    watch = Watch(state.process_index, state.num_processes, lambda: Keys(_client(), prefix))
    watch.start()
    try:
        yield Group(watch, store)
    except BaseException as error:
        if isinstance(error, SystemExit) and not error.code:
            watch.leave()
        else:
            watch.fail(error)
        raise
    watch.leave()


def _join() -> PartialState:
    try:
        check_mode()
        on_cpu = device.choose_kind() == "cpu"
    except RequestError:
        if not is_first_here():  # the first says it; a launcher ends them all as one ends
            time.sleep(TIME_TO_SAY)
        raise
    try:
        # Told that it is a CPU, accelerate makes a group of what torchrun started; else each would train by itself.
        return PartialState(cpu=on_cpu, timeout=LONGEST_WAIT)
    except ValueError as error:
        raise RequestError(f"accelerate cannot run as it was asked to: {error}") from error
    except RuntimeError as error:  # what torch raises for an address that does not answer, or not as it should
        raise WorkError(f"{_where()} did not come to a group: {error}") from error


def _prefix(state: PartialState) -> str:
    """Of this run's keys, drawn by rank 0: a launcher's store may outlive a run that it starts again."""
    drawn = torch.tensor([random.SystemRandom().getrandbits(62)], device=state.device)
    torch.distributed.broadcast(drawn, 0)
    return f"eagle/{drawn.item():x}/"


def _client(keeps: bool = False) -> torch.distributed.TCPStore:
    """A connection to the store by which the group met. keeps: the store stays as long, where it is this process's."""
    keeps = keeps and os.environ.get("TORCHELASTIC_USE_AGENT_STORE") != str(True)
    address, port = os.environ["MASTER_ADDR"], int(os.environ["MASTER_PORT"])
    return torch.distributed.TCPStore(
        address, port, is_master=keeps, multi_tenant=keeps, wait_for_workers=False,
        timeout=datetime.timedelta(seconds=60),
    )  # fmt: skip


def _where() -> str:
    names = ("RANK", "WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT")
    told = " ".join(f"{name}={os.environ[name]}" for name in names if name in os.environ)
    return f"This process (host {socket.gethostname()}, {told})"


@contextmanager
def _in_time(size: int) -> Iterator[None]:
    """End the process where its group of so many does not come together within `TIME_TO_MEET` seconds."""
    met = threading.Event()
    cure = (
        "Start the others, with the same number of machines and processes and the same address and port; one that has "
        "failed says why in its own output."
    )

    def wait() -> None:
        if met.wait(TIME_TO_MEET / 10):
            return
        print(f"note: {_where()} still waits for the group of {size} to come together.", file=sys.stderr, flush=True)
        if met.wait(TIME_TO_MEET * 9 / 10):
            return
        with contextlib.suppress(OSError):
            text = f"error: {_where()} has met no group of {size} in {TIME_TO_MEET:.0f} seconds. {cure}\n"
            os.write(2, text.encode())
        os._exit(1)

    threading.Thread(target=wait, daemon=True).start()
    try:
        yield
    finally:
        met.set()
