"""No process of a group waits for one that has ended: heartbeats and last words through the group's store.

Collectives wait for a lost process until they time out, half an hour with some backends. So a thread of every process
beats in the store by which the group met and listens there. Rank 0 watches the beats of all, the others rank 0's. A
process that ends by an error says so first; whoever hears it, or misses a beat for too long, ends too, with those last
words, whatever its main thread waits for.
"""

from __future__ import annotations

import contextlib
import json
import os
import re
import select
import signal
import socket
import sys
import threading
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass
from types import FrameType
from typing import Any

from eagle.errors import FailedElsewhere, RequestError, WorkError
from eagle.progress import is_first_here
from eagle.text import visible

#: Seconds between two beats.
TICK = 1.0
#: Beats missed in a row by a process that is lost. A busy one beats on: its thread needs a moment of the interpreter.
LOST_AFTER = 45
#: The same once a collective has failed, so that somebody is known to be gone.
LOST_AFTER_BREAK = 10
#: Seconds that an ending process leaves the others to hear of it, and its own main thread to end in order.
GRACE = 5.0
#: Added to the beats of a process that has come to its end as it should.
_DONE = 1 << 40
#: What collectives raise where a peer is gone, in gloo's, NCCL's and HCCL's words.
_BROKEN = re.compile(r"gloo|nccl|hccl|process ?group|connection (reset|closed|refused)|broken pipe", re.IGNORECASE)


@dataclass(frozen=True, slots=True)
class Ending:
    """How a rank ended. code: its exit code. lost: it said nothing; others found it gone."""

    rank: int
    host: str
    code: int
    words: str
    lost: bool = False

    @property
    def code_of_others(self) -> int:
        return 2 if self.code == 2 else 1

    def message(self) -> str:
        verb = "was killed or lost" if self.lost else "ended"
        return f"rank {self.rank} (host {self.host}) {verb}: {self.words}"

    def error(self) -> Exception:
        return RequestError(self.message()) if self.code_of_others == 2 else WorkError(self.message())


LOST_WORDS = (
    "nothing is heard of it any more. Its own output may say why; where there is none, see whether the system ended it "
    "for memory (dmesg), or its machine or the network is down. Checkpoints are whole: the same command goes on from "
    "the last one."
)

SIGTERM_WORDS = (
    "SIGTERM ended it. A launcher sends that to the processes of its machine when one of them has ended, and says "
    "which; so does a scheduler."
)


def last_words(error: BaseException) -> tuple[int, str]:
    """The exit code of a process that ends by this, and what others are to know of it."""
    if isinstance(error, KeyboardInterrupt):
        return 130, "interrupted"
    if isinstance(error, SystemExit):
        return (error.code if isinstance(error.code, int) else 1), "its own output says why."
    if isinstance(error, (RequestError, FileNotFoundError, FileExistsError, NotADirectoryError)):
        return 2, str(error)
    if isinstance(error, WorkError):
        return 1, str(error)
    return 1, f"{type(error).__name__}: {error}"


def is_broken_collective(error: BaseException) -> bool:
    """Whether a collective failed, as it does where another process is gone."""
    ours = isinstance(error, (RequestError, WorkError))
    return isinstance(error, RuntimeError) and not ours and bool(_BROKEN.search(str(error)))


class Keys:
    """One run's keys in a group's store, of which every thread has a client of its own. None of its calls waits.

    Beside every value a counter says that it is there: torch's oldest stores cannot be asked, and `get` would wait.
    """

    def __init__(self, store: Any, prefix: str) -> None:
        self._store, self._prefix = store, prefix

    def set(self, name: str, value: str) -> None:
        self._store.set(self._prefix + name, value)
        self.add(f"{name}/is there", 1)

    def set_first(self, name: str, value: str) -> None:
        """Does nothing where the key is there."""
        self._store.compare_set(self._prefix + name, "", value)
        self.add(f"{name}/is there", 1)

    def get(self, name: str) -> str | None:
        return self._store.get(self._prefix + name).decode() if self.add(f"{name}/is there", 0) else None

    def add(self, name: str, number: int) -> int:
        """To a counter, which begins at 0; its value then."""
        return self._store.add(self._prefix + name, number)


class Watch:
    """The watch of one process over the others. connect: opens the keys, in the thread that uses them.

    ended: who has ended by an error, as far as it is known here. raises_itself: the main thread looks at that itself.
    """

    def __init__(self, rank: int, size: int, connect: Callable[[], Keys]) -> None:
        self.rank, self.size, self.host = rank, size, socket.gethostname()
        self.ended: Ending | None = None
        self.raises_itself = False
        self._connect = connect
        self._done = threading.Event()  # of rank 0: every other process has come to its end
        self._host_of_0 = "?"
        self._own: Ending | None = None
        self._heard = threading.Event()  # all know who ended
        self._leaving = self._closed = self._broken = self._main_ends = False
        self._silence = 0
        self._wake = threading.Event()
        self._threads = [threading.Thread(target=run, daemon=True) for run in (self._beat, self._judge)]
        self._signals, self._signalled = socket.socketpair()

    def start(self) -> None:
        self._restore = _wake_by_signals(self._signalled)
        for thread in self._threads:
            thread.start()

    def leave(self) -> None:
        """This process is done. Rank 0 waits for the others: the store may be its own.

        One that left without having said so would be taken for lost, so it waits as long as it would be missed.
        """
        if self.rank == 0:
            self._done.wait()
        self._leaving = True
        self._wake.set()
        self._threads[0].join(LOST_AFTER * TICK)
        self._closed = True
        self._restore()

    def fail(self, error: BaseException) -> None:
        """Tell the others that this process ends by `error`; returns when they know, or after `GRACE` seconds.

        Where it only met the end of another one, that is what ends it, and this does not return.
        """
        self._broken = is_broken_collective(error)
        if self._broken or isinstance(error, FailedElsewhere):
            until = time.monotonic() + 2 * LOST_AFTER_BREAK * TICK
            while time.monotonic() < until and not self._is_to_end():
                time.sleep(TICK / 10)
            if self._is_to_end():
                self._threads[1].join(4 * GRACE)
        self._main_ends = True
        self.tell(*last_words(error))
        # SIGTERM stays without effect: a launcher sends it as soon as another process has ended, and this one's own
        # words are still to be said.
        self._closed = True

    def tell(self, code: int, words: str) -> None:
        """Say one's last words, if nobody was first. Returns when all have heard, or after `GRACE` seconds."""
        self._own = Ending(self.rank, self.host, code, words)
        self._wake.set()
        self._heard.wait(GRACE)

    def _beat(self) -> None:
        """The one thread that uses the store."""
        try:
            store = self._connect()
            watched = {rank: (0, 0) for rank in (range(1, self.size) if self.rank == 0 else [0])}
            store.set(f"host/{self.rank}", self.host)
            while not self._closed:
                leaving = self._leaving  # which may come to be so meanwhile: then this was a beat like others
                store.add(f"beat/{self.rank}", _DONE if leaving else 1)
                self._silence = 0
                if leaving:
                    return
                self._look_after(store, watched)
                self._listen(store)
                self._wake.wait(TICK if self.ended is None else TICK / 10)
                self._wake.clear()
        except Exception as error:  # whatever the store raises: it is gone
            if self._own is not None:  # who says why it ends is not waited for by others: they may be gone first
                self._heard.set()
            elif not self._closed and self.ended is None:
                self._lose_store(str(error))

    def _look_after(self, store: Keys, watched: dict[int, tuple[int, int]]) -> None:
        """Count the beats that others missed; a lost one is told to all."""
        if self._broken:
            store.add("broken", 1)
        if self._host_of_0 == "?":
            self._host_of_0 = store.get("host/0") or "?"
        patience = LOST_AFTER_BREAK if self._broken or store.add("broken", 0) else LOST_AFTER
        for rank, (beats, missed) in list(watched.items()):
            now = store.add(f"beat/{rank}", 0)
            if now >= _DONE:
                del watched[rank]
            elif now != beats:
                watched[rank] = now, 0
            else:
                watched[rank] = now, missed + 1
                if missed + 1 >= patience and self._own is None:
                    host = store.get(f"host/{rank}") or "?"
                    self._own = Ending(rank, host, 1, LOST_WORDS, lost=True)
        if not watched and self.rank == 0:
            self._done.set()

    def _listen(self, store: Keys) -> None:
        if self.ended is None:
            if self._own:
                store.set_first("ended", json.dumps(asdict(self._own)))
            said = store.get("ended")
            if said is None:
                return
            store.add("heard", 1)
            self.ended = Ending(**json.loads(said))
        if store.add("heard", 0) >= self.size - self.ended.lost:
            self._heard.set()

    def _lose_store(self, why: str) -> None:
        words = f"the store by which the group met is with it, and cannot be reached ({why}); {LOST_WORDS}"
        self.ended = Ending(0, self._host_of_0, 1, words, lost=True)
        self._heard.set()  # nobody can be told

    def _judge(self) -> None:
        """End the process where it is signalled or another one has ended; the main thread may wait in a collective."""
        tick = time.monotonic() + TICK
        while not self._closed:
            signalled = b""
            if select.select([self._signals], [], [], max(0.0, tick - time.monotonic()))[0]:
                signalled = self._signals.recv(16)
            # Signals may wake it at any rate, those of a profiler by the hundred; and none of them is silence.
            if time.monotonic() >= tick:
                tick = time.monotonic() + TICK
                self._silence += 1
            if signal.SIGTERM in signalled:
                self._end(Ending(self.rank, self.host, 128 + signal.SIGTERM, SIGTERM_WORDS))
            if signal.SIGINT in signalled:
                self.tell(130, "interrupted")
                self._wait_for_main(2 * GRACE)
                self._exit(130)
            if self.ended is None and self._silence > LOST_AFTER:
                self._lose_store("no answer")
            if self._is_to_end():
                assert self.ended
                self._heard.wait(GRACE)
                self._wait_for_main(GRACE if self.raises_itself else GRACE / 2)
                self._report(self.ended)
                self._exit(self.ended.code_of_others)

    def _is_to_end(self) -> bool:
        """Whether another process has ended, or the others took this one for lost: they do not wait for it."""
        return self.ended is not None and (self.ended.rank != self.rank or self.ended.lost)

    def _end(self, own: Ending) -> None:
        """By a signal. What ended another one first, and so this one, is the better reason; its own error the best."""
        if self._main_ends:
            self._wait_for_main(GRACE)
        self.tell(own.code, own.words)
        self._report(self.ended or own)
        self._exit(own.code)

    def _wait_for_main(self, seconds: float) -> None:
        """The main thread may be about to end by itself, with more to say."""
        started = time.monotonic()
        while time.monotonic() < started + (3 * GRACE if self._main_ends else seconds):
            time.sleep(TICK / 10)

    def _report(self, ending: Ending) -> None:
        """One process of a machine says it: the first, or the second where that one is lost."""
        second = os.environ.get("LOCAL_RANK") == "1" and ending.host == self.host
        if is_first_here() or (second and ending.lost and ending.rank == self.rank - 1):
            with contextlib.suppress(OSError):
                os.write(2, visible(f"error: {ending.message()}\n").encode())

    def _exit(self, code: int) -> None:
        flushing = threading.Thread(target=_flush, daemon=True)  # a pipe that nobody reads must not hold it up
        flushing.start()
        flushing.join(1.0)
        os._exit(code)


def _flush() -> None:
    with contextlib.suppress(OSError, ValueError):
        sys.stdout.flush()
        sys.stderr.flush()


def _wake_by_signals(end: socket.socket) -> Callable[[], None]:
    """Have every signal written to `end` at once, even while the main thread is in a collective; SIGTERM does no more.

    Returns what takes it back.
    """
    if threading.current_thread() is not threading.main_thread():
        return lambda: None
    end.setblocking(False)
    old_end = signal.set_wakeup_fd(end.fileno(), warn_on_full_buffer=False)
    old = signal.signal(signal.SIGTERM, _wait_for_the_watch)
    os.register_at_fork(after_in_child=_leave_signals)

    def restore() -> None:
        signal.set_wakeup_fd(old_end)
        signal.signal(signal.SIGTERM, old or signal.SIG_DFL)

    return restore


def _wait_for_the_watch(number: int, frame: FrameType | None) -> None:
    """The watch ends the process."""


def _leave_signals() -> None:
    """A forked process has no watch."""
    if signal.getsignal(signal.SIGTERM) is _wait_for_the_watch:
        signal.set_wakeup_fd(-1)
        signal.signal(signal.SIGTERM, signal.SIG_DFL)
