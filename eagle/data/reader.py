"""The records of a file or folder, whichever kind of file holds them: what every step opens conversations with."""

from __future__ import annotations

import errno
import re
import shlex
from pathlib import Path

from eagle.data.arrow_file import ARROW_SUFFIX, ArrowFile, is_arrow
from eagle.data.folder import is_split, split_files, splits_beside
from eagle.data.json_file import JsonFile
from eagle.data.parquet_file import SUFFIX, ParquetFile, is_parquet
from eagle.data.record_file import JoinedRecords, RecordFile, Records
from eagle.errors import RequestError
from eagle.files import check_no_pointer, existing_path, named_kind

#: What names a file of records; any other name is looked into.
SUFFIXES = (".json", ".jsonl", ".ndjson", SUFFIX, ARROW_SUFFIX)
#: What names a table of text, which is converted first.
TABLE_SUFFIXES = {".csv": "csv", ".tsv": "tsv", ".tab": "tsv"}
#: What is looked for in a folder.
SHARD_SUFFIXES = (*SUFFIXES, *TABLE_SUFFIXES)

_EXPECTED = "expected a JSON array, JSON Lines, Parquet or Arrow file, or a folder of them."
#: ``HuggingFaceH4/ultrachat_200k``.
_HUB_NAME = re.compile(r"\w[\w.-]*/\w[\w.-]*")
#: The first bytes of what has to be unpacked first: its name, and the command that does it.
_PACKED = (
    (b"\x1f\x8b", "gzip", "gzip -dc {file} > {made}"),
    (b"\x28\xb5\x2f\xfd", "zstd", "zstd -dc {file} > {made}"),
    (b"BZh", "bzip2", "bzip2 -dc {file} > {made}"),
    (b"\xfd7zXZ\x00", "xz", "xz -dc {file} > {made}"),
    (b"PK\x03\x04", "zip", "unzip {file}"),
)
#: The first bytes of text that is not UTF-8, longest first: what iconv calls it.
_ENCODINGS = (
    (b"\xff\xfe\x00\x00", "UTF-32"),
    (b"\x00\x00\xfe\xff", "UTF-32"),
    (b"\xff\xfe", "UTF-16"),
    (b"\xfe\xff", "UTF-16"),
    *((bytes((character, 0)), "UTF-16LE") for character in b"[{"),
    *((bytes((0, character)), "UTF-16BE") for character in b"[{"),
)


def open_records(path: str | Path, *, allow_truncated: bool = False, flag: str = "--data_path") -> Records:
    """The records of a JSON array, JSON Lines, Parquet or Arrow file, or of a folder of them (`eagle.data.folder`).

    Raises: FileNotFoundError; RequestError when the file is empty, of no such kind, or damaged, or the folder holds no
    such file, or not one split. With `allow_truncated` the whole records before the damage of a JSON file are used
    instead, and `damage` says what was left out.
    """
    path = Path(path)
    if path.is_dir() or is_split(path, SHARD_SUFFIXES):
        split = split_files(path, SHARD_SUFFIXES, flag)
        try:
            parts = [_open_file(file, allow_truncated, flag) for file in split.files]
        except OSError as error:
            if error.errno != errno.EMFILE:
                raise
            raise RequestError(
                f"{flag} {path} has {len(split.files):,} files, more than this process may have open. Allow it more: "
                "'ulimit -n 65536', in the same shell before this command."
            ) from error
        records: Records = JoinedRecords(parts, [split.note] if split.note else [])
    else:
        records = _open_file(path, allow_truncated, flag)
    if not len(records):
        raise RequestError(f"{flag} {path} holds no records; expected a row or more.")
    return records


def _open_file(path: Path, allow_truncated: bool, flag: str) -> RecordFile:
    if not path.exists():
        splits = splits_beside(path, SHARD_SUFFIXES)
        hint = f" Of {path.parent} there are: {', '.join(splits[:5])}." if splits else ""
        if _HUB_NAME.fullmatch(str(path)) and not path.parent.exists():
            hint = f" A data set of the hub is downloaded first: hf download {path} --repo-type dataset --local-dir "
            hint += f"./{path.name}"
        raise FileNotFoundError(f"{flag} {path}: no such file; {_EXPECTED}{hint}")
    if not path.is_file():
        kind = named_kind(path)
        fix = " A pipe can be read once only, and records are read several times: write it to a file first."
        raise RequestError(f"{flag} {path} is {kind}; {_EXPECTED}{fix if kind == 'a pipe' else ''}")
    if path.stat().st_size == 0:
        raise RequestError(f"{flag} {path} is empty; {_EXPECTED}")
    check_no_pointer(path)
    refuse_by_first_bytes(path, flag)
    if is_parquet(path):
        return ParquetFile(path, flag=flag)
    if is_arrow(path):
        return ArrowFile(path, flag=flag)
    if path.suffix.lower() in TABLE_SUFFIXES and first_character(path) not in (b"[", b"{"):
        raise RequestError(f"{flag} {path} is a table; {_EXPECTED} {convert_command(path)} converts it.")
    return JsonFile(path, allow_truncated=allow_truncated, flag=flag)


def existing_records(path: Path, flag: str) -> Path:
    """`path`, where a file or folder of records, or a split of one, is there. Raises: as `existing_path`."""
    return path if are_records(path) else existing_path(path, flag)


def are_records(path: Path) -> bool:
    """Whether a file or folder, or a split of one, is there."""
    return path.exists() or is_split(path, SHARD_SUFFIXES)


def refuse_to_change(path: Path, flag: str, output: Path, output_flag: str = "--output") -> None:
    """Raises: RequestError for an output that is the records of `flag`, or would lie among them."""
    if output.exists() and path.exists() and output.samefile(path):
        raise RequestError(f"{output_flag} {output} is also what {flag} names, which is never changed. Name another.")
    folder = path if path.exists() else path.parent  # of a split
    if folder.is_dir() and folder.resolve() in output.resolve().parents:
        raise RequestError(f"{output_flag} {output} lies in {flag} {folder}, which is never changed. Name another.")


def refuse_by_first_bytes(path: Path, flag: str) -> None:
    """Raises: RequestError for a file that is compressed or not in UTF-8, with the command that changes that."""
    with path.open("rb") as file:
        start = file.read(16)
    for magic, name, command in _PACKED:
        if start.startswith(magic):
            what = "compressed or an Excel workbook (zip)" if name == "zip" else f"compressed ({name})"
            plain = path.with_suffix("") if path.suffix.lower() in (".gz", ".zst", ".bz2", ".xz") else path
            made = plain if plain != path and plain.suffix else plain.with_name(f"{plain.stem}.unpacked.jsonl")
            fix = command.format(file=shlex.quote(str(path)), made=shlex.quote(str(made)))
            or_else = ", or save it as CSV" if name == "zip" else ""
            raise RequestError(f"{flag} {path} is {what}; unpack it first{or_else}: {fix}")
    for magic, name in _ENCODINGS:
        if start.startswith(magic):
            made = path.with_name(f"{path.stem}.utf8{path.suffix}")
            raise RequestError(
                f"{flag} {path} starts with {start[:4]!r}: it is {name}, not UTF-8. Convert it: iconv -f {name} -t "
                f"UTF-8 {shlex.quote(str(path))} > {shlex.quote(str(made))}"
            )


def first_character(path: Path) -> bytes:
    """The first byte of a file behind white space and a byte order mark."""
    with path.open("rb") as file:
        return file.read(64).lstrip(b"\xef\xbb\xbf \t\r\n")[:1]


def convert_command(path: Path) -> str:
    """The command line that makes ShareGPT of a file of another format."""
    # A folder of records is left as it is; one that is named by dots is found by what it is called.
    path_named = path if path.name not in ("", "..") else path.resolve()
    made = path_named.with_name(f"{path_named.stem}.sharegpt.json") if path_named.name else Path("all.sharegpt.json")
    return f"python tools/sharegpt_convert.py --input {shlex.quote(str(path))} --output {shlex.quote(str(made))}"
