"""How far a worker is: what its shards hold of its share, what they do not, and what ``done.json`` says."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path

from eagle.data.cleaning import Tally
from eagle.errors import WorkError
from eagle.store.manifest import DONE
from eagle.store.shard import Shard, shard_number, shard_paths

_COUNTS = ("records", "tokens", "supervised_tokens")


@dataclass(slots=True)
class Progress:
    """The first so many `records` of a worker's share.

    tally: what could not be used, known when the share is done.
    """

    records: int = 0
    tokens: int = 0
    supervised_tokens: int = 0
    tally: Tally = field(default_factory=Tally)

    def to_json(self) -> dict:
        return {name: getattr(self, name) for name in _COUNTS} | self.tally.to_json()

    @classmethod
    def from_json(cls, content: dict) -> Progress:
        return cls(**{name: content[name] for name in _COUNTS}, tally=Tally.from_json(content))


@dataclass(frozen=True, slots=True)
class Stretch:
    """A part of a worker's share that none of its shards holds.

    begin: the progress before it. end: how many records of the share are before its end; None: it goes to the end of
    the share. first: the number of its first shard. shards: how many it has to be written as; None: any number.
    """

    begin: Progress
    end: int | None
    first: int
    shards: int | None

    def of(self, share: Sequence) -> Sequence:
        """Its part of something in the order of the share."""
        return share[self.begin.records : self.end]


def missing(folder: Path) -> list[Stretch]:
    """What a worker's folder does not hold: shards that were deleted, and last what comes behind the newest one.

    Raises: WorkError for a damaged shard, or one that does not fit the one before it.
    """
    found, before, number = [], Progress(), 0
    for path in shard_paths(folder):
        shard = Shard(path)
        progress = Progress.from_json(json.loads(shard.progress))
        start, gap = progress.records - len(shard), shard_number(path) - number
        if start < before.records or (start > before.records) != (gap > 0):
            raise WorkError(
                f"{path} does not follow the shard before it: it starts at record {start:,} of the worker's share, "
                f"not at {before.records:,}. Was it copied here from another store? Delete it and run the same command "
                "again."
            )
        if gap:
            found.append(Stretch(before, start, number, gap))
        before, number = progress, shard_number(path) + 1
    return [*found, Stretch(before, None, number, None)]


def finished(folder: Path) -> Progress | None:
    """What ``done.json`` says, where it is whole and the shards it speaks of are all there."""
    try:
        progress = Progress.from_json(json.loads((folder / DONE).read_text(encoding="utf-8")))
    except (FileNotFoundError, ValueError, KeyError, TypeError):
        return None
    only, *others = missing(folder)
    counted = dataclasses.replace(only.begin, tally=progress.tally)
    return progress if not others and counted == progress else None
