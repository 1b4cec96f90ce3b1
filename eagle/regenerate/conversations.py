"""Which conversations of a data file are asked: those that step 3 would choose, none of them twice."""

from __future__ import annotations

from dataclasses import dataclass, field

from eagle.data import mixture
from eagle.data.cleaning import Dropped, Tally
from eagle.data.record_file import Records
from eagle.data.sharegpt.formats import record_id
from eagle.regenerate.dialogue import Dialogue, read_dialogue


@dataclass(slots=True)
class Conversations:
    """The conversations that are asked, by their index in the data file, in its order, none of them twice.

    questions: in all of them. tally: what was left out and mended. silent: in which no user speaks.
    """

    records: Records
    indices: list[int] = field(default_factory=list)
    questions: int = 0
    tally: Tally = field(default_factory=Tally)
    silent: int = 0
    duplicates: int = 0

    def dialogue(self, index: int) -> Dialogue:
        found = read_dialogue(self.records[index], Tally())
        assert found is not None
        return found

    def name(self, index: int, stem: str) -> str | int:
        """The id that a record brings along, where a file of UTF-8 can hold it, else one that says where it stands."""
        name = record_id(self.records[index])
        if name is None or (isinstance(name, str) and name != _writable(name)):
            return f"{_writable(stem)}_{index}"
        return name


def _writable(text: str) -> str:
    return text.encode("utf-8", "replace").decode()


def choose(records: Records, end_num: int | None, seed: int) -> Conversations:
    """The conversations that step 3 would choose with that seed and number; what cannot be asked is counted."""
    found, seen = Conversations(records), set[bytes]()
    order = mixture.choose(seed, [len(records)], end_num or len(records))
    for index in sorted(order.tolist()):
        try:
            dialogue = read_dialogue(records[index], found.tally)
        except Dropped as dropped:
            found.tally.dropped[dropped.reason] += 1
            found.tally.first.setdefault(dropped.reason, (index, dropped.detail))
            continue
        except ValueError:
            found.tally.dropped["invalid_json"] += 1
            continue
        if dialogue is None:
            found.silent += 1
        elif (digest := dialogue.digest()) in seen:
            found.duplicates += 1
        else:
            seen.add(digest)
            found.indices.append(index)
            found.questions += len(dialogue.questions)
    return found
