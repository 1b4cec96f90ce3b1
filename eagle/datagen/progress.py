"""How far a worker is: what its shards say, what ``done.json`` says, and whether the two agree."""

from __future__ import annotations

import json
from dataclasses import dataclass, field
from pathlib import Path

from eagle.cleaning import Tally
from eagle.features import DONE
from eagle.store.shard import last_progress

_COUNTS = ("records", "tokens", "supervised_tokens")


@dataclass(slots=True)
class Progress:
    """What a resumed worker starts from and what a running one reports: the first so many `records` of its share.

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


def saved_progress(folder: Path) -> Progress:
    """How far the finished shards of a worker's folder reach."""
    saved = last_progress(folder)
    return Progress.from_json(json.loads(saved)) if saved else Progress()


def finished(folder: Path) -> Progress | None:
    """What ``done.json`` says, where the shards it speaks of are all there."""
    path = folder / DONE
    if not path.is_file():
        return None
    progress = Progress.from_json(json.loads(path.read_text(encoding="utf-8")))
    return progress if progress.records == saved_progress(folder).records else None
