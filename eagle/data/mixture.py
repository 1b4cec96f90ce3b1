"""Several ``--data_path``, each with a weight or none of them: which conversations are used, in which order.

    --data_path a.json b.json            all of both; of --end_num N, each has the part that it has of all
    --data_path a.json:0.7 b.json:0.3    of N conversations, 70 % are of a.json and 30 % of b.json

A weight is a path's share of the conversations, relative to the others' weights; no conversation is used twice.
Without --end_num the mixture is the largest one that has these shares. Of each path those conversations are chosen that
would be of it alone, with the same seed. A larger N keeps the conversations of a smaller one, and whatever comes first
in the order has the shares of the whole.
"""

from __future__ import annotations

import re
from collections.abc import Collection, Sequence
from dataclasses import asdict, dataclass
from fractions import Fraction
from pathlib import Path
from typing import Any

import numpy as np

from eagle.data.reader import open_records
from eagle.data.record_file import JoinedRecords, Records, joined_digest, notes_of
from eagle.data.token_source import refuse_other_formats
from eagle.data.tokens import Tokens
from eagle.errors import RequestError, WorkError

FLAG = "--data_path"
DATA_HELP = (
    "conversations: .json, .jsonl, .parquet, .arrow, or a folder of them, as from the hub or save_to_disk; of several, "
    "PATH:WEIGHT says their shares, else all of each are used"
)
#: What ``--data_path`` is given: one path, or the words of several.
DataPath = Path | tuple[str, ...]

_NUMBER = re.compile(r"\d+(\.\d*)?|\.\d+", re.ASCII)


def as_data_path(words: Sequence[str] | None) -> DataPath | None:
    """The words behind the flag, one path among them where there is but one."""
    if not words:
        return None
    return Path(words[0]) if len(words) == 1 else tuple(words)


def spelled(data_path: DataPath) -> str:
    """As it was typed."""
    return str(data_path) if isinstance(data_path, Path) else " ".join(data_path)


@dataclass(frozen=True, slots=True)
class Weighted:
    """One of the paths, and its weight where it was given one."""

    path: Path
    weight: Fraction | None


def read_weights(data_path: DataPath) -> list[Weighted]:
    """The paths that were given, and their weights. A path that is there as it is typed has no weight.

    Raises: RequestError for weights that are none, or not for every path, and for a path that is given twice.
    """
    found = [_weighted(str(word)) for word in ([data_path] if isinstance(data_path, (str, Path)) else data_path)]
    without = [one for one in found if one.weight is None]
    if len(found) == 1 and not without:
        raise RequestError(
            f"{FLAG} {spelled(data_path)}: a weight is a share beside other paths, and this is the only one. Leave it "
            "out; --end_num says how many conversations are used."
        )
    if 0 < len(without) < len(found):
        raise RequestError(
            f"{FLAG} {spelled(data_path)}: {without[0].path} has no weight, and others have. Give each one, as in "
            f"{without[0].path}:0.5, or none."
        )
    paths = [one.path.resolve() for one in found]
    if twice := [one.path for at, one in enumerate(found) if paths[at] in paths[:at]]:
        raise RequestError(f"{FLAG} names {twice[0]} more than once; no conversation is used twice. Leave one out.")
    return found


def _weighted(word: str) -> Weighted:
    path, colon, weight = word.rpartition(":")
    if not colon or not path or Path(word).exists():
        return Weighted(Path(word), None)
    if _NUMBER.fullmatch(weight) and Fraction(weight) > 0:
        return Weighted(Path(path), Fraction(weight))
    if Path(path).exists():
        raise RequestError(
            f"{FLAG} {word}: the weight {weight!r} is no number above 0; expected one such as {path}:0.7, or no colon. "
            "A path that is not to be used is left out."
        )
    return Weighted(Path(word), None)


def choose(seed: int, sizes: Sequence[int], count: int, shares: Sequence[float] | None = None) -> np.ndarray:
    """The `count` conversations that are used, in the order of the job, as indices into all of the sources.

    sizes: how many each source holds. shares: of each, where there are several.
    """
    # RandomState's streams are frozen for good, unlike the newer generators'.
    if shares is None:
        return np.random.RandomState(seed).permutation(sizes[0])[:count]
    indices, keys = [], []
    starts = np.cumsum([0, *sizes])
    for number, own in enumerate(counts_of(shares, count)):
        indices.append(starts[number] + np.random.RandomState(seed).permutation(sizes[number])[:own])
        # One in each of `own` equal stretches of the order, anywhere in it: strictly in turn, one of two workers would
        # get all of one source.
        keys.append((np.arange(own) + np.random.RandomState([seed, number]).random_sample(own)) / max(own, 1))
    return np.concatenate(indices)[np.argsort(np.concatenate(keys), kind="stable")]


def counts_of(shares: Sequence[float], count: int) -> list[int]:
    """How many of `count` each share is, in whole conversations; of a larger count each gets as many or more.

    Webster's method: a share's conversation j is due at (j + 1/2) / share, and the first `count` are taken.
    """
    due = [(np.arange(int(share * (count + len(shares))) + 2) + 0.5) / share for share in shares]
    source = np.repeat(np.arange(len(shares)), [len(own) for own in due])
    first = np.argsort(np.concatenate(due), kind="stable")[:count]
    return np.bincount(source[first], minlength=len(shares)).tolist()


def most_of(shares: Sequence[float], sizes: Sequence[int]) -> int:
    """The largest count of which no share is more than its source holds."""
    end = min((size + 0.5) / share for size, share in zip(sizes, shares, strict=True))
    return sum(int(((np.arange(size) + 0.5) / share < end).sum()) for size, share in zip(sizes, shares, strict=True))


def sources_of(sizes: Sequence[int], indices: Sequence[int] | np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Of indices into all sources: the source of each, and its index there."""
    starts = np.cumsum([0, *sizes])
    numbers = np.searchsorted(starts, indices, side="right") - 1
    return numbers, np.asarray(indices) - starts[numbers]


@dataclass(frozen=True, slots=True)
class Data:
    """The conversations behind ``--data_path``: all of them, and how many are used.

    records: of all sources, one behind the other. shares: of each source, None where one path was given. weighted:
    whether weights say them; else they are those of the sources' sizes.
    """

    paths: list[Path]
    sources: list[Records]
    records: Records
    digests: list[str]
    shares: list[float] | None
    weighted: bool
    conversations: int

    @property
    def sizes(self) -> list[int]:
        return [len(source) for source in self.sources]

    @property
    def digest(self) -> str:
        return joined_digest(self.digests)

    def refuse_other_formats(self, indices: Sequence[int]) -> None:
        """Raises: RequestError where all of a source's conversations among these are of a format for step 2."""
        numbers, own = sources_of(self.sizes, indices)
        for number, (path, source) in enumerate(zip(self.paths, self.sources, strict=True)):
            refuse_other_formats(source, own[numbers == number].tolist(), path)

    def notes(self, end_num: int | None) -> list[str]:
        """What is used of them, and what is left out."""
        found = notes_of(self.records, end_num)
        if self.weighted and end_num is None:
            found.append("without --end_num, as many conversations are used as have these shares without repeating any")
        return found

    def to_json(self) -> dict:
        """For a store's manifest."""
        files = self.records.files
        damaged = [{"file": str(file.path), **asdict(file.damage)} for file in files if file.damage]
        content: dict[str, Any] = {
            "path": str(self.paths[0].resolve()),
            "digest": self.digest,
            "records": len(self.records),
            "damage": damaged or None,
        }
        if len(files) == 1:
            content["damage"] = asdict(files[0].damage) if files[0].damage else None
        if self.shares is None:
            return content
        counts = counts_of(self.shares, self.conversations)
        rows = zip(self.paths, self.digests, self.sizes, self.shares, counts, strict=True)
        names = ("path", "digest", "records", "share", "conversations")
        sources = [dict(zip(names, (str(path.resolve()), *row), strict=True)) for path, *row in rows]
        return content | {"path": [source["path"] for source in sources], "sources": sources}


def open_data(data_path: DataPath, end_num: int | None, *, allow_truncated: bool = False) -> Data:
    """The conversations that a job uses, at most `end_num`.

    Raises: FileNotFoundError, RequestError as `open_records` and `read_weights` do; for shares that cannot be had.
    """
    given = read_weights(data_path)
    paths = [one.path for one in given]
    sources = [open_records(path, allow_truncated=allow_truncated) for path in paths]
    digests = [source.digest() for source in sources]
    for at, digest in enumerate(digests):
        if (first := digests.index(digest)) < at:
            raise RequestError(f"{FLAG}: {paths[first]} and {paths[at]} hold the same. Leave one out.")
    sizes = [len(source) for source in sources]
    total = sum(sizes)
    count = min(total, end_num or total)
    if len(given) == 1:
        return Data(paths, sources, sources[0], digests, None, False, count)
    joined, weights = JoinedRecords(sources), [one.weight for one in given if one.weight is not None]
    if not weights:
        return Data(paths, sources, joined, digests, [size / total for size in sizes], False, count)
    shares = [max(float(weight / sum(weights)), 1e-12) for weight in weights]  # no share is 0
    most = most_of(shares, sizes)
    count = end_num or most
    for path, size, share, own in zip(paths, sizes, shares, counts_of(shares, count), strict=True):
        if own > size:
            raise RequestError(
                f"--end_num {count:,}: a share of {share:.1%} is {own:,} conversations of {path}, which holds {size:,}."
                f" With these weights at most {most:,} fit: pass --end_num {most}, or leave it out. Without weights "
                "each path has the share that it has of all."
            )
        if not own:
            raise RequestError(
                f"{FLAG} {path}: a share of {share:.1%} of {count:,} conversations is none. Use more conversations"
                f"{' (--end_num)' if end_num else ''}, or leave this path out."
            )
    return Data(paths, sources, joined, digests, shares, True, count)


@dataclass(frozen=True, slots=True)
class Outcome:
    """What came out of one source. usable: of its `conversations`; records: the rows that they are."""

    path: str
    share: float
    conversations: int
    usable: int
    records: int
    tokens: int
    repeated: int = 0

    def line(self, usable: int, tokens: int) -> str:
        """For people. usable, tokens: of all sources."""
        left_out = (
            f" ({self.conversations - self.usable:,} more are left out)" if self.usable < self.conversations else ""
        )
        twice = f"; {self.repeated:,} are in a path before it too" if self.repeated else ""
        return (
            f"{self.path}: {self.usable:,} conversations{left_out}, {self.usable / max(usable, 1):.1%} of all (asked: "
            f"{self.share:.1%}); {self.tokens:,} tokens, {self.tokens / max(tokens, 1):.1%}{twice}"
        )


def outcomes(tokens: Tokens, indices: Sequence[int], sources: Sequence[dict]) -> list[Outcome]:
    """What came of each source: of the conversations at `indices`, which `tokens` are of. sources: as in a manifest."""
    numbers, _ = sources_of([source["records"] for source in sources], indices)
    lengths = tokens.lengths
    rows = numbers[tokens.conversation]
    first = (lengths > 0) & (tokens.part == 0)
    seen: dict[int, int] = {}
    repeated = [0] * len(sources)
    for row in np.flatnonzero(first)[np.argsort(rows[first], kind="stable")].tolist():
        if seen.setdefault(hash(tokens[row].input_ids.tobytes()), int(rows[row])) != rows[row]:
            repeated[rows[row]] += 1
    return [
        Outcome(
            source["path"],
            source["share"],
            int((numbers == number).sum()),
            int((first & (rows == number)).sum()),
            int(((lengths > 0) & (rows == number)).sum()),
            int(lengths[rows == number].sum()),
            repeated[number],
        )
        for number, source in enumerate(sources)
    ]


def outcome_lines(found: Sequence[Outcome], elsewhere: Collection[str] = ()) -> list[str]:
    """elsewhere: the paths of which other nodes can use some, whatever this one can.

    Raises: WorkError where not one conversation of another source can be used, and of others some can.
    """
    unusable = [one for one in found if one.conversations and not one.usable]
    empty = [one for one in unusable if one.path not in elsewhere]
    if empty and len(unusable) < len(found):
        raise WorkError(
            f"{FLAG} {empty[0].path}: none of its {empty[0].conversations:,} conversations can be used. Give it alone "
            "to see why (--dry_run), or leave it out."
        )
    usable, tokens = sum(one.usable for one in found), sum(one.tokens for one in found)
    lines = [one.line(usable, tokens) for one in found]
    return [
        f"{line}; other nodes can use some" if one.path in elsewhere else line
        for one, line in zip(found, lines, strict=True)
    ]
