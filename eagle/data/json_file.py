"""Random access to the records of a JSON array or JSON Lines file, without loading it.

The file is memory-mapped and scanned once for where its records lie (16 bytes a record are kept); a record is
parsed when it is asked for. A damaged file is refused with the byte and the record where the damage begins.
"""

from __future__ import annotations

import hashlib
import json
import math
import mmap
import re
import shlex
from array import array
from pathlib import Path
from typing import Any

from eagle.data.cleaning import CONVERSATION_NAMES
from eagle.data.record_file import Damage, RecordFile
from eagle.errors import RequestError

# A whole string (its closing quote captured: empty where the file ends inside it) or a structural character.
_TOKEN = re.compile(rb'"[^"\\]*(?:\\.[^"\\]*)*("?)|[{}\[\],]', re.DOTALL)
_WHITESPACE = b" \t\r\n"
#: What stands in front of the records of ``{"data": [...]}``.
_WRAPPER = re.compile(rb'"data"\s*:\s*$')
#: How an object begins whose records lie in a field of another name.
_WRAPS = re.compile(rb'\s*\{\s*"(\w+)"\s*:\s*\[\s*[{\[]')
#: Lines that are looked at to tell JSON Lines from one object over several lines.
_LOOKED_AT = 20


class TooDeep(ValueError):
    """A record is whole, but nested more deeply than Python's parser goes."""


class JsonFile(RecordFile):
    """Records of a ``.json`` array or ``.jsonl`` file, by index: ``len(file)``, ``file[i]``, iteration.

    An array may also be the ``data`` of an object that is the whole file: ``{"data": [...]}``.

    ``file[i]`` raises ValueError when that record is not valid JSON or not UTF-8, `TooDeep` among them, while the
    records around it are whole; the caller decides whether one bad record matters.

    Raises: RequestError when the file holds no records, is not JSON, or is damaged (the byte and the record are
    named). With `allow_truncated` the whole records before the damage are used instead and `damage` says what was left
    out.
    """

    def __init__(self, path: str | Path, *, allow_truncated: bool = False, flag: str = "--data_path") -> None:
        self.path = Path(path)
        with self.path.open("rb") as file:
            self._bytes = mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ)
        self._starts, self._ends = array("q"), array("q")
        first = self._skip_whitespace(3 if self._bytes[:3] == b"\xef\xbb\xbf" else 0)
        self.is_array = self._bytes[first : first + 1] == b"[" and not self._first_line_is_a_list(first)
        if self.is_array:
            self._scan_array(first)
        elif self._bytes[first : first + 1] in (b"{", b"[") or self._is_lines(first):
            wrapped = self._wrapped_array(first)
            if wrapped is None:
                self._scan_lines(first, flag)
            else:
                self._scan_array(wrapped, wrapped=True)
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
        return _parsed(self._bytes[self._starts[index] : self._ends[index]])

    def digest(self) -> str:
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
        return _is_whole(self._bytes[first:end])

    def _wrapped_array(self, first: int) -> int | None:
        """Where the array of ``{"data": [...]}`` begins: of objects or lists, in an object behind which nothing comes.

        A line of JSON Lines ends before it could be taken for one; so does a record whose ``data`` are texts.
        """
        depth, found = 0, None
        for token in _TOKEN.finditer(self._bytes, first):
            at, character = token.start(), self._bytes[token.start()]
            if character in b"[{":
                if depth == 1 and character == 0x5B and _WRAPPER.search(self._bytes[max(first, at - 64) : at]):
                    inside = self._skip_whitespace(at + 1)
                    found = at if self._bytes[inside : inside + 1] in (b"{", b"[") else found
                depth += 1
            elif character in b"]}":
                depth -= 1
                if depth == 0:
                    return found if self._skip_whitespace(token.end()) == len(self._bytes) else None
            elif character == 0x22 and not token.group(1):
                break
        return found  # the file ends inside of it

    def _scan_array(self, first: int, *, wrapped: bool = False) -> None:
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
                    return None if wrapped else self._check_tail(token_end)
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

    def _scan_lines(self, first: int, flag: str) -> None:
        start = first
        while start < len(self._bytes):
            newline = self._bytes.find(b"\n", start)
            end = newline if newline >= 0 else len(self._bytes)
            if self._skip_whitespace(start) < end:
                self._add(start, end)
            start = end + 1
        if not self._is_lines(first) or self._is_one_value():
            raise RequestError(self._no_lines(flag))
        # Only the last line can have been cut short, and only where nothing ends it.
        last = self._bytes[self._starts[-1] : self._ends[-1]]
        if self._bytes[len(self._bytes) - 1] != 0x0A and not _is_whole(last):
            start = self._starts.pop()
            self._ends.pop()
            self.damage = Damage(len(self), start, "its last line is not whole JSON.")

    def _is_lines(self, first: int) -> bool:
        """Whether one of the first lines is a record by itself, and not a part of an object over several lines.

        One bad line is the caller's to judge; where none of them is a record, the file is something else.
        """
        start = first
        for _ in range(_LOOKED_AT):
            newline = self._bytes.find(b"\n", start)
            line = self._bytes[start : newline if newline >= 0 else len(self._bytes)].strip()
            if line[:1] in (b"{", b"[") and line[-1:] in (b"}", b"]") and len(line) > 2 and _is_whole(line):
                return True
            if newline < 0:
                break
            start = newline + 1
        return False

    def _is_one_value(self) -> bool:
        """Whether the first line leaves brackets open and the last one closes some: a value over several lines, of
        which some may be whole by themselves."""
        begin, end = (_open_brackets(self._bytes[self._starts[at] : self._ends[at]]) for at in (0, -1))
        return begin is not None and end is not None and begin > 0 > end

    def _no_lines(self, flag: str) -> str:
        try:
            self[0]
            error: ValueError | None = None
        except ValueError as failed:
            error = failed
        told = f"{flag} {self.path} is neither a JSON array nor JSON Lines: its first line does not parse ({error})."
        if error is None:
            return f"{flag} {self.path} is neither a JSON array nor JSON Lines: its lines hold no record."
        if not _is_balanced(self._bytes):
            return told
        source, made = shlex.quote(str(self.path)), shlex.quote(str(self.path.with_suffix("")) + ".lines.jsonl")
        line = self._bytes[self._starts[0] : self._ends[0]].rstrip()
        if line.endswith(b",") and _is_whole(line[:-1]):
            cure = f"sed -E 's/,[[:space:]]*$//' {source} > {made}"
            return f"{told} Its lines end with commas; take them out: {cure}"
        if (name := _WRAPS.match(self._bytes)) and name[1].decode() not in CONVERSATION_NAMES:
            key = name[1].decode()
            return f"""{told} It is an object whose records lie in {key!r}: jq -c '.["{key}"][]' {source} > {made}"""
        return f"{told} It holds objects over several lines; write each into one: jq -c . {source} > {made}"


def _parsed(text: bytes) -> Any:
    try:
        return json.loads(text)
    except RecursionError as error:
        if _is_balanced(text):
            raise TooDeep("it is nested too deeply") from error
        raise ValueError("its brackets do not match") from error


def _is_whole(text: bytes) -> bool:
    """Whether a text is one JSON value, however deeply nested."""
    try:
        _parsed(text)
    except TooDeep:
        return True
    except ValueError:
        return False
    return True


def _is_balanced(text: bytes | mmap.mmap) -> bool:
    """Whether every bracket and every string of a text closes, none before it opens."""
    return _open_brackets(text, least=0) == 0


def _open_brackets(text: bytes | mmap.mmap, least: float = -math.inf) -> int | None:
    """How many more brackets open than close; None where a string does not end, or where it is less than `least`."""
    depth = 0
    for token in _TOKEN.finditer(text):
        character = token.group()[:1]
        depth += (character in b"[{") - (character in b"]}")
        if depth < least or (character == b'"' and not token.group(1)):
            return None
    return depth
