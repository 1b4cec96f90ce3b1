"""Where a draft is weak: slices of the replies, and remedies by what they gain."""

from __future__ import annotations

import json

import pytest

from eagle.decode.diagnosis import (
    CATEGORY,
    CONTEXT,
    KIND,
    POSITION,
    REMEDIES,
    bucket,
    diagnosis,
    diagnosis_lines,
    slices,
    tau_of,
)
from eagle.decode.generate import Generation, Step
from eagle.decode.replies import Reply

K = 3


def step(accepted: int, is_outside: bool = False) -> Step:
    return Step(accepted, min(accepted + 1, K), tuple(range(1, accepted + 1)), 0.01, 0.03, is_outside)


def reply(steps: list[Step], category: str = "", prompt_tokens: int = 10, tokens: list[int] | None = None) -> Reply:
    count = 1 + sum(one.accepted + 1 for one in steps)
    return Reply("p", category, 1, prompt_tokens, Generation(tokens or [1] * count, steps, 0.0, 1.0), None)


def test_slices_count_every_draft_once_and_where_it_was() -> None:
    vocabulary = frozenset({1})
    some = [
        reply([step(2), step(0, is_outside=True)], "code", 120, [1, 1, 1, 1, 9]),
        reply([step(1)] * 40, "maths", 600),
    ]
    found = slices(some, vocabulary)
    assert all(sum(one.drafts for one in group) == 42 for group in found.values())
    assert {one.name: (one.drafts, one.first, one.accepted) for one in found[CATEGORY]} == {
        "code": (2, 1, 2), "maths": (40, 40, 40),
    }  # fmt: skip
    assert [(one.name, one.drafts) for one in found[POSITION]] == [("0-15", 10), ("16-63", 24), ("64-255", 8)]
    assert [(one.name, one.drafts) for one in found[CONTEXT]] == [("0-127", 2), ("512-2047", 40)]
    assert [(one.drafts, one.first) for one in found[KIND]] == [(41, 41), (1, 0)]
    assert slices(some, None)[KIND] == []
    assert bucket(300, (0, 16, 64, 256)) == "256 and more"


def names(replies: list[Reply], vocabulary: frozenset[int] | None = None) -> list[str]:
    found = diagnosis(replies, K, vocabulary)
    json.dumps(found)
    gains = [one["tau_gain"] for one in found["remedies"]]
    assert gains == sorted(gains, reverse=True) and len(gains) <= 3
    return [one["name"] for one in found["remedies"]]


GOOD = [step(3)] * 9 + [step(2)]
BAD = [step(0)] * 9 + [step(2)]


def test_the_remedy_is_of_what_is_weak() -> None:
    good, weak = [reply(GOOD, "code") for _ in range(8)], [reply(BAD, "maths") for _ in range(8)]
    assert names(good + weak)[0] == "category"
    assert "category" not in names(good), "all alike"
    far = [reply(BAD, prompt_tokens=3000) for _ in range(8)]
    assert names(good + far)[0] == "long contexts"
    ends = [reply([*GOOD[:5], *[step(0)] * 60]) for _ in range(3)]
    assert "long replies" in names(ends) and "beginnings of replies" not in names(ends)
    begins = [reply([*[step(0)] * 14, *[step(3)] * 20]) for _ in range(3)]
    assert names(begins)[0] == "beginnings of replies"
    decays = [reply([step(1)] * 50 + [step(0)] * 10)]
    assert names(decays)[0] == "unrolled steps"
    assert "training" in names([reply([step(0)] * 40 + [step(1)] * 20)])


def test_a_small_vocabulary_is_found_by_what_it_rejects() -> None:
    steps = [one for _ in range(20) for one in (step(3), step(0, is_outside=True))]
    tokens, start = [1], 1
    for one in steps:
        tokens += [1] * one.accepted + [9 if one.is_outside else 1]
        start += one.accepted + 1
    found = [reply(steps, tokens=tokens)]
    assert names(found, frozenset({1}))[0] == "draft vocabulary"
    assert "draft vocabulary" not in names(found, None)
    lines = "\n".join(diagnosis_lines(diagnosis(found, K, frozenset({1}))))
    assert "100% of the rejections" in lines and "--draft_vocab_size" in lines
    assert "next token not in it" in lines and "+1." in lines


def test_little_is_compared_with_nothing_and_nothing_is_no_fault() -> None:
    few = [reply([step(3)] * 5, "code"), reply([step(0)] * 5, "maths")]
    assert "category" not in names(few)
    assert diagnosis([], K, None)["remedies"] == []
    assert list(diagnosis_lines(diagnosis([], K, None))) == []
    assert len({remedy.name for remedy in REMEDIES}) == len(REMEDIES)


def test_tau_of_rates() -> None:
    assert tau_of([0.5, 0.5]) == pytest.approx(1.75)
