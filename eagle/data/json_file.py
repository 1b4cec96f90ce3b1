"""Random access to the records of a JSON array or JSON Lines file, without loading it.

The file is memory-mapped and scanned once for where its records lie (16 bytes a record are kept); a record is
parsed when it is asked for. A damaged file is refused with the byte and the record where the damage begins.
"""

from __future__ import annotations

import hashlib
import json
import mmap
import re
from array import array
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from eagle.errors import RequestError

# A whole string (its closing quote captured: empty where the file ends inside it) or a structural character.
_TOKEN = re.compile(rb'"[^"\\]*(?:\\.[^"\\]*)*("?)|[{}\[\],]', re.DOTALL)
_WHITESPACE = b" \t\r\n"


@dataclass(frozen=True, slots=True)
class Damage:
    """Where a data file stops being whole: the record it happens in (0-based) and that record's first byte."""

    record: int
    byte: int
    reason: str


class JsonFile:
    """Records of a ``.json`` array or ``.jsonl`` file, by index: ``len(file)``, ``file[i]``, iteration.

    ``file[i]`` raises ValueError when that record is not valid JSON or not UTF-8 while the records around it
    are whole; the caller decides whether one bad record matters.

    Raises: RequestError when the file holds no records, is not JSON, or is damaged (the byte and the record are
    named). With `allow_truncated` the whole records before the damage are used instead and `damage` says what was left
    out.
    """

    def __init__(self, path: str | Path, *, allow_truncated: bool = False, flag: str = "--data_path") -> None:
        self.path = Path(path)
        with self.path.open("rb") as file:
            self._bytes = mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ)
        self._starts, self._ends = array("q"), array("q")
        self.damage: Damage | None = None
        first = self._skip_whitespace(3 if self._bytes[:3] == b"\xef\xbb\xbf" else 0)
        self.is_array = self._bytes[first : first + 1] == b"[" and not self._first_line_is_a_list(first)
        if self.is_array:
            self._scan_array(first)
        elif self._bytes[first : first + 1] in (b"{", b"["):
            self._scan_lines(first)
        else:
            found = self._bytes[first : first + 20]
            raise RequestError(
                f"{flag} {path} starts with {found!r}; expected a JSON array ('[') or JSON Lines ('{{'), in UTF-8."
            )
        if self.damage and not allow_truncated:
            raise RequestError(
                f"{flag} {path} is damaged: {self.damage.reason} Record {self.damage.record} (counting from 0) "
                f"starts at byte {self.damage.byte} of {len(self._bytes)} and is not whole. Fetch the file again, or "
                f"pass --allow_truncated to use the {len(self)} whole records before it."
            )
        if not len(self):
            raise RequestError(f"{flag} {path} holds no records; expected a JSON array or JSON Lines file.")

    def __len__(self) -> int:
        return len(self._starts)

    def __getitem__(self, index: int) -> Any:
        try:
            return json.loads(self._bytes[self._starts[index] : self._ends[index]])
        except RecursionError as error:
            raise ValueError("it is nested too deeply") from error

    def __iter__(self) -> Iterator[Any]:
        return (self[index] for index in range(len(self)))

    def digest(self) -> str:
        """sha256 of the file."""
        digest = hashlib.sha256()
        for start in range(0, len(self._bytes), 1 << 24):
            digest.update(self._bytes[start : start + (1 << 24)])
        return digest.hexdigest()

    def _skip_whitespace(self, at: int) -> int:
        while at < len(self._bytes) and self._bytes[at] in _WHITESPACE:
            at += 1
        return at

    def _first_line_is_a_list(self, first: int) -> bool:
        """JSON Lines whose lines are lists begin like an array: tell them apart by a whole first line."""
        end = self._bytes.find(b"\n", first)
        second = self._skip_whitespace(end) if end >= 0 else len(self._bytes)
        if self._bytes[second : second + 1] not in (b"[", b"{"):
            return False
        try:
            json.loads(self._bytes[first:end])
        except (ValueError, RecursionError):
            return False
        return True

    def _scan_array(self, first: int) -> None:
        depth, start, token_end = 0, first + 1, first
        for token in _TOKEN.finditer(self._bytes, first):
            token_end = token.end()
            character = self._bytes[token.start()]
            if character == 0x22:  # a string
                if not token.group(1):
                    break
            elif character in b"[{":
                depth += 1
            elif character == 0x2C:  # a comma
                if depth == 1:
                    self._add(start, token.start())
                    start = token.end()
            else:
                depth -= 1
                if depth == 0:
                    if self._skip_whitespace(start) < token.start():
                        self._add(start, token.start())
                    return self._check_tail(token_end)
        self.damage = Damage(len(self), self._skip_whitespace(start), "it ends in the middle of a record.")
        return None

    def _check_tail(self, end: int) -> None:
        rest = self._skip_whitespace(end)
        if rest < len(self._bytes):
            self.damage = Damage(len(self), rest, "something follows the array's closing bracket.")

    def _add(self, start: int, end: int) -> None:
        start = self._skip_whitespace(start)
        self._starts.append(start)
        self._ends.append(max(start, end))

    def _scan_lines(self, first: int) -> None:
        start = first
        while start < len(self._bytes):
            newline = self._bytes.find(b"\n", start)
            end = newline if newline >= 0 else len(self._bytes)
            if self._skip_whitespace(start) < end:
                self._add(start, end)
            start = end + 1
        # Only the last line can have been cut short; the ones between are checked when they are read.
        try:
            self[0]
        except ValueError as error:
            raise RequestError(
                f"{self.path} is neither a JSON array nor JSON Lines: its first line does not parse ({error})."
            ) from error
        try:
            self[len(self) - 1]
        except ValueError:
            start = self._starts.pop()
            self._ends.pop()
            self.damage = Damage(len(self), start, "its last line is not whole JSON.")
