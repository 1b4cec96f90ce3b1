"""Every reply on disk as it comes: what a run that was killed goes on from.

A file of JSON Lines that is only ever appended to. Its first line says what the replies are of; each other one is a
reply under the digest of what was asked:

    {"regenerate": 1, "options": {"temperature": 0.0, ...}}
    {"key": "8f0c...", "behind": 0, "prompt": [1, 319, ...], "ids": [450, ..., 2], "text": "The ...", "finish": "stop"}

A line is written in one call, so a killed process leaves at most one that is not whole, which is cut off. The disk is
told to keep what was written every few seconds: that is against power cuts.
"""

from __future__ import annotations

import contextlib
import dataclasses
import json
import os
import threading
import time
import uuid
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from eagle.errors import RequestError, WorkError
from eagle.files import fsync_folder

FORMAT = 1
#: Seconds between two calls for the disk to keep what was written.
_SYNC_SECONDS = 5.0

#: How a reply ended. "stop": by its end of turn. "length": cut at --max_new_tokens, or at the end of the context. The
#: others are no replies: the server's filter kept one back; the prompt leaves no room; the server cut the prompt down;
#: the chat template refuses it.
FINISHES = ("stop", "length", "filtered", "too_long", "prompt_cut", "rejected")
STOP, LENGTH, FILTERED, TOO_LONG, CUT, REJECTED = FINISHES


@dataclass(frozen=True, slots=True)
class Answer:
    """What came for one question.

    behind: so many tokens of the row before stand in front of `prompt`, all of it or 0. prompt: the token ids that were
    asked with, behind those. ids: the sampled ones, the end of turn included; None where a server gave the text alone.
    text: of the reply, without its end of turn. finish: one of `FINISHES`. context: where it is the context that ended
    it, how long that was, 0 where a server has not said that; else None.
    """

    finish: str
    text: str = ""
    ids: list[int] | None = None
    prompt: list[int] = dataclasses.field(default_factory=list)
    behind: int = 0
    context: int | None = None

    def is_final(self, context: int) -> bool:
        """Whether a context of so many tokens would end it as it ended; of one that is not known, nobody can say."""
        return self.context is None or context <= self.context


def journal_path(output: Path) -> Path:
    return output.with_name(f"{output.name}.journal")


def read_header(path: Path) -> dict[str, Any] | None:
    """What the replies of a journal are of; None where there is none, or not a whole line of one.

    Raises: RequestError for a file that is no journal, or of a later format.
    """
    if not path.is_file():
        return None
    with path.open("rb") as file:
        line = file.readline()
    if not line.endswith(b"\n"):
        if b'{"regenerate": '.startswith(line[:15]):
            return None  # killed while it was begun
        line = b""
    try:
        header = json.loads(line)
        version, options = header["regenerate"], header["options"]
    except (ValueError, KeyError, TypeError):
        raise RequestError(
            f"{path} is in the way: it is no journal of replies, which is what has this name beside --output. Move it "
            "away, or name another --output."
        ) from None
    if version != FORMAT:
        raise RequestError(
            f"{path} is of format {version}; this release reads {FORMAT}. Go on with the one that began."
        )
    return options


def differences(before: Mapping[str, Any], now: Mapping[str, Any]) -> list[str]:
    """What of `now` is not as it was, in words."""

    def shown(name: str, value: Any) -> str:
        return str(value)[:16] if name.endswith("digest") else repr(value)

    return [
        f"{name} was {shown(name, before.get(name))}, now {shown(name, now[name])}"
        for name in now
        if before.get(name) != now[name]
    ]


def check_same(path: Path, begun: Mapping[str, Any], options: Mapping[str, Any]) -> None:
    """Raises: RequestError where the journal's replies are of other options."""
    if changed := differences(begun, options):
        raise RequestError(
            f"{path} holds replies that were asked for otherwise: {'; '.join(changed)}. Repeat that command to go on "
            "with it, name another --output, or pass --overwrite to begin anew."
        )


class Journal:
    """Replies by key, of which only the places in the file are held in memory. Several threads may call it.

    overwrite: replies of other options make way. options: those of its header, and `job`, by which one job is known.
    Raises: RequestError while another process has it, and for one of other options.
    """

    def __init__(self, path: Path, options: Mapping[str, Any], *, overwrite: bool = False) -> None:
        self.path, self.damaged = path, 0
        self._places: dict[bytes, int] = {}
        self._lock, self._synced = threading.Lock(), time.monotonic()
        read_header(path)
        self._file = _held(path)
        try:
            begun = read_header(path)
            if begun is not None and differences(begun, options):
                if not overwrite:
                    check_same(path, begun, options)
                begun = None
            self.options = begun if begun is not None else {**options, "job": uuid.uuid4().hex}
            if begun is not None:
                self._end = self._read()
                self._file.truncate(self._end)
            else:
                self._end = 0
                self._file.truncate(0)
                self._append({"regenerate": FORMAT, "options": self.options})
                os.fsync(self._file.fileno())
                fsync_folder(path.parent)
        except BaseException:
            self._file.close()
            raise

    def _read(self) -> int:
        """Where the last whole line ends. A line that is damaged is as if it had never come."""
        end = 0
        with self.path.open("rb") as file:
            for number, line in enumerate(file):
                if not line.endswith(b"\n"):
                    break
                try:
                    key = bytes.fromhex(json.loads(line)["key"]) if number else None
                except (ValueError, KeyError, TypeError):
                    self.damaged += 1
                else:
                    if key is not None:
                        self._places[key] = end
                end += len(line)
        return end

    def __len__(self) -> int:
        return len(self._places)

    def __contains__(self, key: bytes) -> bool:
        return key in self._places

    def get(self, key: bytes) -> Answer | None:
        place = self._places.get(key)
        if place is None:
            return None
        with self._lock:
            line = _line_at(self._file.fileno(), place)
        fields = json.loads(line)
        fields.pop("key")
        return Answer(**fields)

    def put(self, key: bytes, answer: Answer) -> None:
        """Raises: WorkError where the disk takes no more; what was written before it is kept."""
        with self._lock:
            self._places[key] = self._append({"key": key.hex(), **dataclasses.asdict(answer)})
            if time.monotonic() - self._synced > _SYNC_SECONDS:
                os.fsync(self._file.fileno())
                self._synced = time.monotonic()

    def _append(self, content: dict[str, Any]) -> int:
        line = json.dumps(content).encode() + b"\n"
        start = self._end
        try:
            written = 0
            while written < len(line):
                written += os.pwrite(self._file.fileno(), line[written:], start + written)
        except OSError as error:
            with contextlib.suppress(OSError):
                self._file.truncate(start)
            raise WorkError(
                f"{self.path} could not be written ({error.strerror}). The {len(self):,} replies in it are kept: make "
                "room and run the same command again, which goes on behind them."
            ) from error
        self._end = start + len(line)
        return start

    def remove(self) -> None:
        """Once its replies are elsewhere, and while it is held: a job that comes now begins one of its own."""
        self.path.unlink()

    def close(self) -> None:
        with self._lock:
            self._file.close()

    def __enter__(self) -> Journal:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()


def _line_at(descriptor: int, place: int, size: int = 1 << 14) -> bytes:
    while True:
        piece = os.pread(descriptor, size, place)
        end = piece.find(b"\n")
        if end >= 0:
            return piece[:end]
        size *= 4


def _held(path: Path) -> Any:
    """The file, which no other job has. Raises: RequestError."""
    import fcntl  # not on Windows, where the other steps do work

    while True:
        file = os.fdopen(os.open(path, os.O_RDWR | os.O_CREAT, 0o666), "r+b", buffering=0)
        try:
            fcntl.flock(file.fileno(), fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            file.close()
            raise RequestError(f"{path} is in use by another running job; wait for it or end it.") from None
        except OSError:
            return file  # a file system without locks: two jobs at once are then the user's to avoid
        # One that another job removed before it let go of it is nobody's any more.
        with contextlib.suppress(FileNotFoundError):
            if os.path.samestat(os.fstat(file.fileno()), path.stat()):
                return file
        file.close()
