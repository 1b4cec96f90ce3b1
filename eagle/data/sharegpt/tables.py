"""Rows of CSV and TSV files. A cell in quotes may hold line breaks; in the TSV of many programs a quote is text."""

from __future__ import annotations

import csv
import re
import sys
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import Any, Literal

from eagle.data.sharegpt.formats import Unusable, plain_name
from eagle.errors import RequestError

FLAG = "--input"
TABLES = ("csv", "tsv")
BAD_QUOTES = "the row's quotes do not match"
WRONG_WIDTH = "the row has more or fewer cells than the header"
TWO_READINGS = "its quotes could be text, or enclose a cell of several lines"

#: A cell of a TSV whose quotes enclose cells and nothing else, and what ends it.
_QUOTED_CELL = re.compile(r'(?:"[^"]*(?:""[^"]*)*"|[^"\t\r\n]*)(?:\t|\r?\n|\r|\Z)')


class TableSource:
    """Rows of a CSV or TSV file, as dicts by the names in its first row.

    The lines of a row that cannot be read come as one `Unusable` each.

    Raises: RequestError for a file without rows, or that ends inside a quoted cell (while it is
    read; with `allow_truncated` that row is left out instead).
    """

    count = None  # known only by reading it all

    def __init__(self, path: Path, kind: str, allow_truncated: bool) -> None:
        _lift_field_limit()
        self._path, self.kind, self._allow_truncated = path, kind, allow_truncated
        self.notes: list[str] = []
        self.paths = [path]
        # Spreadsheets write semicolons where the comma is the decimal point.
        delimiters = ("\t",) if kind == "tsv" else (",", ";", "\t")
        headers = [(header, delimiter) for delimiter in delimiters if (header := self._header(delimiter))]
        if not headers:
            raise RequestError(
                f"{FLAG} {path}: its first line cannot be read as {kind.upper()} column names; expected a line such "
                f"as {delimiters[0].join(('prompt', 'response'))!r}. Put one there, or mend its quotes."
            )
        self.header, self._delimiter = max(headers, key=lambda entry: len(entry[0]))
        repeated = [name for name, count in Counter(map(plain_name, self.header)).items() if count > 1]
        if repeated:
            raise RequestError(f"{FLAG} {path}: two columns are called {repeated[0]!r}. Rename one of them.")
        self._quoting: Literal[0, 3] = csv.QUOTE_MINIMAL
        if kind == "tsv" and self._quotes_are_text():
            self._quoting = csv.QUOTE_NONE
            self.notes.append("its quotes are read as text: not all of them enclose a cell, and every line is a row")
        if next(iter(self), None) is None:
            raise RequestError(f"{FLAG} {path} holds no rows; expected a row of column names, then one row a record.")

    def samples(self) -> list[Any]:
        return [dict.fromkeys(self.header, "")]

    def __iter__(self) -> Iterator[Any]:
        lines: list[str] = []  # of the row that is read
        with self._open() as file:
            rows = csv.reader(_kept(file, lines), delimiter=self._delimiter, quoting=self._quoting, strict=True)
            next(rows)
            while True:
                lines.clear()
                first = rows.line_num + 1
                try:
                    row = next(rows)
                except StopIteration:
                    return
                except csv.Error as error:
                    if "unexpected end" in str(error):
                        self._refuse_open_quote(first)
                        return
                    yield from (Unusable(BAD_QUOTES) for _ in lines)
                    continue
                if self.kind == "tsv" and len(lines) > 1 and all(map(self._is_row, lines)):
                    yield from (Unusable(TWO_READINGS) for _ in lines)
                elif row:
                    yield self._record(row)

    def _record(self, row: list[str]) -> Any:
        width = len(self.header)
        if len(row) < width or any(row[width:]):
            return Unusable(WRONG_WIDTH)
        return dict(zip(self.header, row[:width], strict=True))

    def _is_row(self, line: str) -> bool:
        """Whether a line is a row by itself where quotes are text."""
        cells = line.rstrip("\r\n").split(self._delimiter)
        return len(cells) == len(self.header) and all(map(str.strip, cells))

    def _quotes_are_text(self) -> bool:
        """Whether every line has a cell for every column, and some quote encloses none."""
        width = len(self.header)
        with self._open() as file:
            lines = (line.rstrip("\r\n") for line in file)
            if any(line and len(line.split(self._delimiter)) != width for line in lines):
                return False
        with self._open() as file:
            text = file.read()
        at = 0 if '"' in text else len(text)
        while at < len(text):
            cell = _QUOTED_CELL.match(text, at)
            if cell is None:
                return True
            at = cell.end()
        return False

    def _refuse_open_quote(self, line: int) -> None:
        what = f"the row that starts in line {line:,} opens a quoted cell that never closes"
        if not self._allow_truncated:
            raise RequestError(
                f"{FLAG} {self._path} is damaged: {what}. Fetch the file again, or pass --allow_truncated to use "
                "the rows before it."
            )
        self.notes.append(f"left out everything from line {line:,}: {what}")

    def _header(self, delimiter: str) -> list[str]:
        """The names in the first row, or none where it is not well-formed with this delimiter."""
        with self._open() as file:
            try:
                header = next(csv.reader(file, delimiter=delimiter, strict=True), [])
            except csv.Error:
                return []
        while header and not header[-1].strip():
            header.pop()
        return header

    def _open(self) -> Any:
        # Bytes that are not UTF-8 must not end the file: their rows are dropped when they come to be written.
        return self._path.open(encoding="utf-8-sig", errors="surrogateescape", newline="")


def _kept(file: Iterator[str], lines: list[str]) -> Iterator[str]:
    for line in file:
        lines.append(line)
        yield line


def _lift_field_limit() -> None:
    limit = sys.maxsize
    while True:
        try:
            csv.field_size_limit(limit)
            return
        except OverflowError:  # the limit is a C long: 32 bits on Windows
            limit >>= 1
