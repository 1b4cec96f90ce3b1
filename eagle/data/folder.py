"""Which files of a folder hold its records: data sets as they come from the hub, or as `datasets` writes them.

    FOLDER/state.json dataset_info.json data-00000-of-00002.arrow ...    ``save_to_disk`` of a Dataset
    FOLDER/dataset_dict.json train/ test/                                ``save_to_disk`` of a DatasetDict
    FOLDER/README.md data/train-00000-of-00002.parquet ...               a repository of the hub
    FOLDER/part-0.jsonl part-1.jsonl ...                                 any other files of records, of one kind

A split is named behind the folder, ``FOLDER/train``, whether there is such a folder or only files that are called so.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from eagle.errors import RequestError
from eagle.files import read_json

DICT, STATE = "dataset_dict.json", "state.json"
_STATE = "what save_to_disk of `datasets` writes"
#: What lies beside records and is none.
_BESIDE = (DICT, STATE, "dataset_info.json", "dataset_infos.json", "config.json")
#: What tools/regenerate.py puts behind a file's name to name the report on its records, which lies beside them too.
REPORT = ".report.json"
#: What tells that a folder is something else, what it is, and where it belongs.
_FOREIGN = (
    (("shard-*.safetensors", "*/shard-*.safetensors", "data_*.ckpt"), "a store of features", "--tmpdir"),
    (
        ("*.safetensors", "tokenizer_config.json", "tokenizer.json", "pytorch_model*.bin"),
        "a model's folder",
        "--model_name",
    ),
    (("train_options.json",), "a training run", "--cpdir"),
)
_PACKED = (".gz", ".zst", ".bz2", ".xz")
#: ``train_sft-00000-of-00003-a3ecf92756993583.parquet``.
_NUMBERED = re.compile(r"(?P<split>.+?)[-.](?P<number>\d+)-of-(?P<count>\d+)(?!\d)")
#: A name that says which split it is of, as `datasets` reads names; ``train_0`` and ``train_1`` are of one.
_SAYS_SPLIT = re.compile(
    r"(?i)(?:^|[-_. ])(train|training|validation|valid|val|dev|test|testing|eval|evaluation)(?=$|[-_. \d])"
)
_NUMBER_BEHIND = re.compile(r"[-_. ]*\d+$")
#: How far down records are looked for: ``FOLDER/data/config/split/0000.parquet``.
_DEPTH = 3

#: A split: its files, or the folder in which ``save_to_disk`` put it.
_Split = list[Path] | Path


@dataclass(frozen=True, slots=True)
class SplitFiles:
    """The files of one split, in their order. note: which it is, where it was chosen among others."""

    files: list[Path]
    note: str = ""


def is_split(path: Path, suffixes: Sequence[str]) -> bool:
    """Whether a path that does not exist names a split of the folder before its last part."""
    return path.name in splits_beside(path, suffixes)


def splits_beside(path: Path, suffixes: Sequence[str]) -> list[str]:
    """The splits that a path which does not exist could have named: those of the folder before its last part."""
    if path.suffix.lower() in suffixes or path.exists() or not path.parent.is_dir() or _foreign(path.parent):
        return []
    try:
        return sorted(name for name in _splits(path.parent, suffixes) if name)
    except (RequestError, OSError):  # of something that nobody asked for
        return []


def split_files(path: Path, suffixes: Sequence[str], flag: str) -> SplitFiles:
    """The files that hold the records of a folder, or of the split of one. suffixes: of files that hold records.

    Raises: RequestError for a folder that holds none or is something else, where a split has to be named, and where a
    part of it is missing.
    """
    if not path.is_dir():
        return SplitFiles(_whole(_splits(path.parent, suffixes)[path.name], path, flag))
    if foreign := _foreign(path):
        what, where = foreign
        raise RequestError(f"{flag} {path} is {what}, which is for {where}; expected {_EXPECTED}")
    found = _splits(path, suffixes)
    if not found:
        raise RequestError(f"{flag} {path} is a folder without records; expected {_EXPECTED}")
    if len(found) == 1:
        # Of files whose names tell no split all are meant, those that lie too deep as well.
        if "" in found and (file := _beyond(path, suffixes)):
            raise RequestError(
                f"{flag} {path}: {file} lies further down than records are looked for, which is {_DEPTH} folders below "
                "the one that is named. Name the folders that are meant."
            )
        return SplitFiles(_whole(next(iter(found.values())), path, flag))
    named = sorted(name for name in found if name)
    if "train" not in found:
        rest = found.get("", [])
        alone = [str(file.relative_to(path)) for file in rest] if isinstance(rest, list) else []
        raise RequestError(
            f"{flag} {path} holds several splits or files ({', '.join([*named, *alone][:9])}), and none is called "
            f"train. Name one, such as {flag} {path / named[0]}"
        )
    others = [name for name in named if name != "train"]
    note = f"{path}: of its splits, train is used"
    note += (
        f"; to use another ({', '.join(others)}), name it: {path / others[0]}" if others else ", not the other files"
    )
    return SplitFiles(_whole(found["train"], path, flag), note)


_EXPECTED = (
    "a folder of .json, .jsonl, .parquet or .arrow files, or one that save_to_disk of `datasets` wrote. Name that, or "
    "the files."
)


def _splits(folder: Path, suffixes: Sequence[str], depth: int = _DEPTH) -> dict[str, _Split]:
    """What a folder holds, by split; "" for files whose names tell none."""
    if (folder / DICT).is_file():
        return {str(name): folder / str(name) for name in read_json(folder / DICT, _STATE).get("splits", ())}
    if _is_saved(folder):
        return {"": folder}
    entries = sorted(entry for entry in folder.iterdir() if not entry.name.startswith("."))
    own: dict[str, _Split] = {}
    for entry in entries:
        if _holds_records(entry, suffixes):
            files = own.setdefault(_split_of(entry), [])
            assert isinstance(files, list)
            files.append(entry)
    inner: dict[str, dict[str, _Split]] = {}
    for entry in entries if depth else ():
        if _is_looked_into(entry) and (found := _splits(entry, suffixes, depth - 1)):
            inner[entry.name] = found
    if not own and len(inner) == 1:
        return next(iter(inner.values()))
    for name, found in inner.items():
        name += "/" * (name in own)  # files are called so too; this is the folder
        own |= {name: next(iter(found.values()))} if len(found) == 1 else {f"{name}/{k}": v for k, v in found.items()}
    return own


def _beyond(folder: Path, suffixes: Sequence[str], depth: int = _DEPTH) -> Path | None:
    """The first file of records further down than is looked, None where there is none."""
    if (folder / DICT).is_file() or _is_saved(folder):
        return folder if depth < 0 else None
    entries = sorted(entry for entry in folder.iterdir() if not entry.name.startswith("."))
    if depth < 0 and (own := next((entry for entry in entries if _holds_records(entry, suffixes)), None)):
        return own
    inner = (entry for entry in entries if _is_looked_into(entry))
    return next(filter(None, (_beyond(entry, suffixes, depth - 1) for entry in inner)), None)


def _is_looked_into(path: Path) -> bool:
    return path.is_dir() and path.name[0] != "_" and _foreign(path) is None


def _holds_records(path: Path, suffixes: Sequence[str]) -> bool:
    name = path.name.lower()
    for packed in _PACKED:
        name = name.removesuffix(packed)
    is_report = name.endswith(REPORT) and name.removesuffix(REPORT).endswith(tuple(suffixes))
    return name.endswith(tuple(suffixes)) and path.name not in _BESIDE and not is_report and path.is_file()


def _split_of(path: Path) -> str:
    if numbered := _NUMBERED.match(path.name):
        return numbered["split"]
    stem = path.name.split(".")[0]
    return _NUMBER_BEHIND.sub("", stem) if _SAYS_SPLIT.search(stem) else ""


def _foreign(folder: Path) -> tuple[str, str] | None:
    for patterns, what, where in _FOREIGN:
        if any(any(folder.glob(pattern)) for pattern in patterns):
            return what, where
    return None


def _is_saved(folder: Path) -> bool:
    state = folder / STATE
    return state.is_file() and "_data_files" in read_json(state, _STATE)


def _whole(split: _Split, path: Path, flag: str) -> list[Path]:
    """The files of a split, all there. Raises: RequestError."""
    if isinstance(split, Path):
        return _saved_files(split, flag)
    kinds = sorted({file.suffix.lower() for file in split})
    if len(kinds) > 1:
        raise RequestError(
            f"{flag} {path} holds files of several kinds ({', '.join(kinds)}), which may be the same records twice. "
            f"Name those that are meant: {flag} {split[0].parent}/*{kinds[0]}"
        )
    numbered = [found for file in split if (found := _NUMBERED.match(file.name))]
    if not numbered:
        return split
    numbers, count = sorted(int(found["number"]) for found in numbered), max(int(found["count"]) for found in numbered)
    is_one_set = len(numbered) == len(split) and all(int(found["count"]) == count for found in numbered)
    if not is_one_set or numbers not in (list(range(count)), list(range(1, count + 1))):
        missing = sorted(set(range(count)) - set(numbers))
        what = f"lacks number {', '.join(map(str, missing[:5]))}" if missing else "holds another number"
        raise RequestError(
            f"{flag} {path}: by the name of {split[0].name} it is one of {count} files, and the folder {what} of them. "
            "Fetch the data set again, whole and into an empty folder, or name the files that are meant."
        )
    return split


def _saved_files(folder: Path, flag: str) -> list[Path]:
    """The files of a Dataset that ``save_to_disk`` wrote. Raises: RequestError."""
    if not _is_saved(folder):
        raise RequestError(
            f"{flag} {folder} was to hold a split that save_to_disk of `datasets` wrote, and has no {STATE} that says "
            "so. Copy or save the data set again."
        )
    state = read_json(folder / STATE, _STATE)
    listed = state["_data_files"]
    if not (
        isinstance(listed, list) and all(isinstance(f, dict) and isinstance(f.get("filename"), str) for f in listed)
    ):
        raise RequestError(f"{flag} {folder}: its {STATE} does not say which files it has. Save the data set again.")
    apart = [name for name, value in state.items() if name.startswith("_indices") and value]
    apart += [name for file in listed for name in ("skip", "take") if file.get(name)]
    if apart:
        raise RequestError(
            f"{flag} {folder}: an old release of `datasets` wrote which rows it selects, and in which order, apart "
            f"from them ({', '.join(apart)} in {STATE}). Save it again, into another folder: "
            "load_from_disk(...).flatten_indices().save_to_disk(...)."
        )
    files = [folder / file["filename"] for file in listed]
    if missing := [file.name for file in files if not file.is_file()]:
        raise RequestError(
            f"{flag} {folder} lacks {', '.join(missing[:3])}, which its {STATE} names. Copy or save the data set again."
        )
    if not files:
        raise RequestError(f"{flag} {folder} holds no records: its {STATE} names no files.")
    return files
