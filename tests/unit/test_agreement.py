"""What ranks tell each other before a run starts: who differs, in what, and what helps; nothing where all agree."""

import copy

import pytest

from eagle.train.agreement import disagreement, remarks

SEEN = {
    "host": "a",
    "command": {"--lr": None, "--bs": 4},
    "sees": {
        "device": {"device": "cpu"},
        "base model": {"fingerprint": "f"},
        "draft": {"config": "c"},
        "records": {"records": 10, "tokens": 100},
        "checkpoint": {"newest": "state_120 (epoch 1, batch 3)"},
    },
    "versions": {"torch": "2.13.0"},
}


def said(*changes: tuple[str, ...]) -> list[dict]:
    """Rank 0, and a rank for each change: a path into what is seen, and its value there."""
    ranks = [SEEN]
    for number, (*path, name, value) in enumerate(changes, 1):
        one = copy.deepcopy(SEEN)
        one["host"] = "abcdef"[number]
        place = one
        for step in path:
            place = place[step]
        place[name] = value
        ranks.append(one)
    return ranks


NONE = ("host", "b")


def test_all_agree():
    assert disagreement(said(NONE, NONE)) is None and remarks(said(NONE, NONE)) == []


@pytest.mark.parametrize(
    ("change", "says"),
    [
        (("command", "--lr", 0.1), "the command: --lr is 0.1 there and not given on rank 0. Start every process with"),
        (("sees", "device", "device", "cuda"), "the device: device is cuda there and cpu on rank 0. Start all"),
        (("sees", "base model", "fingerprint", "g"), "the base model: fingerprint is g there and f on rank 0. --base"),
        (("sees", "draft", "config", "d"), "the draft: config is d there and c on rank 0. --configpath"),
        (("sees", "records", "records", 9), "the records: records is 9 there and 10 on rank 0. --tmpdir"),
        (("sees", "checkpoint", "newest", "none"), "newest is none there and state_120 (epoch 1, batch 3) on rank 0."),
    ],
)
def test_a_rank_that_differs_is_named(change, says):
    found = disagreement(said(NONE, change))
    assert found.startswith("rank 2 (host c) differs from rank 0 (host a) in the ") and says in found
    assert "more differ" not in found and found.endswith("Nothing was trained or written.")


def test_several_that_differ():
    found = disagreement(said(("sees", "records", "tokens", 1), NONE, ("command", "--bs", 1), ("command", "--bs", 2)))
    assert "rank 1 (host b)" in found and "2 more differ too." in found


def test_what_follows_from_the_command_is_not_told():
    ranks = said(("command", "--bs", 1))
    ranks[1]["sees"]["records"]["records"] = 1
    assert "records" not in disagreement(ranks)


def test_other_versions_are_a_remark():
    ranks = said(("versions", "torch", "2.1.0"))
    assert disagreement(ranks) is None
    assert remarks(ranks) == ["rank 1 (host b) has other versions: torch is 2.1.0 there and 2.13.0 on rank 0"]
