"""Files and folders of conversations in, one ShareGPT file out: the request, its report and the writer.

Records pass one at a time; a data set larger than the memory goes through.
"""

from __future__ import annotations

import contextlib
import dataclasses
import filecmp
import json
import os
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from tqdm import tqdm

from eagle.data.cleaning import Tally
from eagle.data.reader import existing_records, refuse_to_change
from eagle.data.sharegpt.formats import (
    BAD_UNICODE,
    CONTEXT_NAMES,
    FORMATS,
    Columns,
    Shape,
    Unusable,
    detect,
    plain_name,
    record_id,
    to_turns,
)
from eagle.data.sharegpt.sources import FLAG, TABLES, Source, TableSource, open_source
from eagle.data.token_source import is_tokens
from eagle.errors import RequestError, WorkError
from eagle.files import check_output_file, fsync_folder

TOKENS = "it is tokens already, which step 3 takes as they are"


@dataclass(frozen=True, slots=True)
class ConvertRequest:
    """The options of ``tools/sharegpt_convert.py``, checked as far as they can be on their own."""

    input: tuple[Path, ...]
    output: Path
    format: str | None = None
    prompt_column: str | None = None
    response_column: str | None = None
    system_column: str | None = None
    overwrite: bool = False
    allow_truncated: bool = False

    def __post_init__(self) -> None:
        if self.output.suffix.lower() not in (".json", ".jsonl"):
            raise RequestError(f"--output {self.output}: expected a name that ends in .json or .jsonl (JSON Lines).")
        if self.columns and self.format not in (None, "prompt_response", *TABLES):
            raise RequestError(
                f"--prompt_column, --response_column and --system_column name the columns of prompt_response, csv "
                f"and tsv files; --format {self.format} has its own. Leave one of the two out."
            )
        twice = [path for path, count in Counter(path.resolve() for path in self.input).items() if count > 1]
        if twice:
            raise RequestError(f"{FLAG} names {twice[0]} more than once; expected each file once. Leave one out.")
        for path in self.input:
            existing_records(path, FLAG)
            refuse_to_change(path, FLAG, self.output)
        check_output_file(self.output, overwrite=self.overwrite)

    @property
    def columns(self) -> Columns:
        return Columns.named(self.prompt_column, self.response_column, self.system_column)


@dataclass(slots=True)
class Conversion:
    """One input file or folder: how it was recognised, and what became of its records."""

    path: Path
    source: Source
    shape: Shape
    how: str
    prefix: str
    read: int = 0
    kept: int = 0
    dropped: Counter[str] = field(default_factory=Counter)
    mended: Tally = field(default_factory=Tally)

    def write_to(self, writer: ShareGPTWriter) -> None:
        """Convert every record; what cannot be converted is counted and passed over."""
        bar = tqdm(self.source, total=self.source.count, unit="rec", disable=None, leave=False, desc=self.path.name)
        for index, record in enumerate(bar):
            self.read += 1
            mended = Tally()
            try:
                if is_tokens(record):
                    raise Unusable(TOKENS)
                turns = to_turns(record, self.shape, mended)
                name = record_id(record)
                writer.write({"id": f"{self.prefix}_{index}" if name is None else name, "conversations": turns})
            except Unusable as reason:
                self.dropped[str(reason)] += 1
                continue
            self.kept += 1
            self.mended.add(mended)

    def lines(self) -> list[str]:
        """The report, for people."""
        lines = [f"read    {self.read:>7,}  records", f"kept    {self.kept:>7,}  conversations"]
        lines += [f"dropped {count:>7,}  {reason}" for reason, count in self.dropped.most_common()]
        return lines + self.mended.lines() + [f"note: {note}" for note in self.source.notes]


def plan(request: ConvertRequest) -> list[Conversion]:
    """Open and recognise every input, so that a wrong one is refused before anything is written."""
    conversions: list[Conversion] = []
    for path in request.input:
        source = open_source(path, request.format, request.allow_truncated)
        told = request.format if request.format in FORMATS else None
        samples = source.samples()
        if samples and all(map(is_tokens, samples)):
            raise RequestError(
                f"{FLAG} {path} holds tokens, which step 3 takes as they are and which would be lost here: name it in "
                "allocation.py's --data_path, which takes several."
            )
        try:
            shape, votes = detect(samples, told, request.columns)
        except RequestError as error:
            raise RequestError(f"{FLAG} {path}: its format is {error}") from None
        if request.columns and shape.columns is None:
            raise RequestError(
                f"{FLAG} {path} is {shape}, which has no columns; leave out --system_column "
                f"{request.system_column}. A system turn among the turns is kept as it is."
            )
        source.notes += _unread(samples, request.columns)
        stem = path.absolute().stem  # "." is a folder too
        same = sum(stem == other.path.absolute().stem for other in conversions)
        prefix = f"{stem}-{same + 1}" if same else stem
        shape = dataclasses.replace(shape, told=told is not None)
        conversions.append(Conversion(path, source, shape, _how(source, told, votes, len(samples)), prefix))
    _check_apart(conversions)
    return conversions


def _unread(samples: list[Any], named: Columns) -> list[str]:
    """What questions may be about, and is left out since their column was named alone."""
    names = {plain_name(name) for sample in samples if isinstance(sample, dict) for name in sample}
    left = sorted(names & set(CONTEXT_NAMES) - {named.prompt, named.response, named.system})
    if not named.prompt or not left:
        return []
    return [
        f"not read: {', '.join(left)}. Whoever names --prompt_column means that one alone; without it --format alpaca "
        "and prompt_response put what stands there below the question"
    ]


def _check_apart(conversions: Sequence[Conversion]) -> None:
    """Raises: RequestError where two inputs hold the same file, or a copy of it."""
    seen: dict[int, list[Path]] = {}
    for conversion in conversions:
        for path in conversion.source.paths:
            alike = seen.setdefault(path.stat().st_size, [])
            for other in alike:
                if path.resolve() == other.resolve() or filecmp.cmp(path, other, shallow=False):
                    raise RequestError(
                        f"{FLAG} {conversion.path}: {path} holds the same as {other}, so its records would be there "
                        "twice. Leave one out."
                    )
            alike.append(path)


def _how(source: Source, told: str | None, votes: int, looked_at: int) -> str:
    if isinstance(source, TableSource):
        seen = f"by the names in the first row of the {source.kind.upper()}"
    else:
        seen = f"by {votes:,} of {looked_at:,} records looked at"
    return f"told by --format; {votes:,} of {looked_at:,} records looked at fit" if told else seen


class ShareGPTWriter:
    """A ShareGPT file, written one record at a time under another name and renamed when it is whole.

    A context manager: leaving it normally puts the file in place, an exception leaves nothing behind.

    Raises: WorkError where the file system refuses (full, read-only).
    """

    def __init__(self, path: Path) -> None:
        self.path, self.count = path, 0
        self._is_array = path.suffix.lower() == ".json"
        self._temporary = path.with_name(f".{path.name}.tmp")

    def __enter__(self) -> ShareGPTWriter:
        try:
            self.path.parent.mkdir(parents=True, exist_ok=True)
            self._file = self._temporary.open("wb")
        except OSError as error:
            raise self._failed(error) from error
        return self

    def write(self, record: dict[str, Any]) -> None:
        """Raises: Unusable for text that UTF-8 cannot hold; WorkError."""
        try:
            line = json.dumps(record, ensure_ascii=False).encode("utf-8")
        except UnicodeEncodeError as error:
            raise Unusable(BAD_UNICODE) from error
        before = (b",\n" if self.count else b"[\n") if self._is_array else b""
        try:
            self._file.write(before + line + (b"" if self._is_array else b"\n"))
        except OSError as error:
            raise self._failed(error) from error
        self.count += 1

    def __exit__(self, kind: type[BaseException] | None, *_: object) -> None:
        try:
            if kind is None:
                self._file.write(b"\n]\n" if self._is_array else b"")
                self._file.flush()
                os.fsync(self._file.fileno())
                self._file.close()
                self._temporary.replace(self.path)
                fsync_folder(self.path.parent)
        except OSError as error:
            raise self._failed(error) from error
        finally:
            self._discard()

    def _discard(self) -> None:
        # A full disk refuses the rest of the buffer once more; the file goes away anyway.
        with contextlib.suppress(OSError):
            self._file.close()
        self._temporary.unlink(missing_ok=True)

    def _failed(self, error: OSError) -> WorkError:
        return WorkError(
            f"--output {self.path} could not be written ({error.strerror or error}); nothing was left behind. Make "
            "room or choose another place, then run again."
        )
