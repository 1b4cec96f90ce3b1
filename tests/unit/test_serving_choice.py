"""Known costs and acceptances give known choices; costs of something else are refused; smaller vocabularies."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest

from eagle.decode.generate import Generation, Step
from eagle.decode.replies import Reply
from eagle.decode.sampling import Sampling
from eagle.decode.serving_choice import (
    Gap,
    Measured,
    asked_of,
    choose,
    need,
    of_report,
    rate_of,
    serving_report,
)
from eagle.decode.serving_lines import serving_lines
from eagle.decode.smaller_vocabulary import by_coverage, by_frequency, cut, smaller
from eagle.decode.step_costs import Cost, cost_of, is_settled, read_step_costs, shape_of
from eagle.drafts.choices import DraftChoices
from eagle.drafts.families import DRAFT_FAMILIES
from eagle.errors import RequestError
from eagle.target.config import load_config
from tests.costs import shape, write_costs
from tests.tiny import make_target

ONE, EIGHT, TWO = shape("eagle1", 49152), shape("eagle3", 8192), shape("eagle3", 2048)


def costs(folder: Path, alone, drafts, **engine):
    return read_step_costs(write_costs(folder / "costs.json", alone, drafts, **engine))


def shown(report) -> str:
    return "\n".join(serving_lines(report))


def test_the_cost_of_a_step_is_the_quickest_and_its_spread_what_was_met_again():
    assert cost_of([[5.0, 4.0], [4.2, 6.0], [9.0, 8.0]]) == Cost(4.0, pytest.approx(0.05))
    assert cost_of([[4.0, 5.0, 6.0]]) == Cost(4.0, 0.25)  # of one round by its median
    assert is_settled([[4.0], [4.1]]) and not is_settled([[4.0], [4.4]]) and not is_settled([[4.0, 4.0]])


def test_between_what_was_measured_lies_a_line(tmp_path):
    drafts = {TWO: {1: {1: 10.0, 5: 14.0}}, EIGHT: {1: {1: 12.0, 5: 20.0}}}
    found = costs(tmp_path, {1: 8.0}, drafts)
    assert found.cost(TWO, 1, 1) == Cost(10.0, 0.0)
    assert found.cost(TWO, 3, 1) == Cost(12.0, 0.0, is_between=True)
    assert found.cost(shape(size=5120), 1, 1) == Cost(11.0, 0.0, is_between=True)  # between the vocabularies
    assert found.cost(shape(size=5120), 3, 1).ms == 14.0
    # Outside of what was measured nothing is guessed.
    for unknown in (shape(size=16384), shape(size=1024), shape(size=5120, layer="another"), ONE):
        assert found.cost(unknown, 1, 1) is None
    assert found.cost(TWO, 6, 1) is None and found.cost(TWO, 1, 4) is None


def test_tau_by_cost_decides_k(tmp_path):
    # At K 1, 2, 3: 1.5 / 1.2, 1.8 / 1.3, 1.9 / 1.5.
    drafts = {EIGHT: {1: {1: 12.0, 2: 13.0, 3: 15.0, 4: 16.0}}}
    report = serving_report(costs(tmp_path, {1: 10.0}, drafts), [Measured("d", EIGHT, (0.5, 0.3, 0.1))])
    (choice,) = report["batches"]
    assert (choice["pays"], choice["num_speculative_tokens"]) == (True, 2)
    assert choice["speedup"] == pytest.approx(1.8 / 1.3)
    points = choice["curves"][0]["points"]
    assert [point["num_speculative_tokens"] for point in points] == [1, 2, 3]  # at 4 nothing was drafted
    assert [point["tau"] for point in points] == pytest.approx([1.5, 1.8, 1.9])
    assert "Best: eagle3 of 8,192, K 2: 1.38 times." in shown(report)
    assert (
        "eagle3 of 8,192 (d): no more than 3 tokens were drafted, so a larger K of it is not judged. Draft 4"
        in shown(report)
    )


def test_drafts_of_different_lengths_are_each_said_to_be(tmp_path):
    """The one that drafted less may have been better beyond that; and a cost that is not known is no short draft."""
    drafts = {EIGHT: {1: {k: 10.0 + k for k in range(1, 6)}}, TWO: {1: {k: 10.0 + k for k in range(1, 4)}}}
    found = costs(tmp_path, {1: 10.0}, drafts)
    short, long = Measured("short", EIGHT, (0.9, 0.8, 0.7)), Measured("long", TWO, (0.6, 0.5, 0.4, 0.3, 0.2))
    said = shown(serving_report(found, [short, long]))
    assert "eagle3 of 8,192 (short): no more than 3 tokens were drafted" in said and "(long): no more" not in said
    assert "eagle3 of 2,048 (long) was not measured at K 4, 5 with this batch size" in said
    assert "with the same --output, for that batch size, shape and K." in said
    assert "(short) was not measured" not in said


def test_of_nothing_that_was_drafted_nothing_is_said():
    assert "nothing was drafted, since no reply is longer than one token" in shown(None)


def test_a_draft_that_pays_alone_and_not_in_a_batch(tmp_path):
    drafts = {EIGHT: {1: {1: 12.0, 2: 13.0}, 16: {1: 80.0, 2: 90.0}}}
    report = serving_report(costs(tmp_path, {1: 10.0, 16: 40.0}, drafts), [Measured("d", EIGHT, (0.5, 0.3))])
    one, sixteen = report["batches"]
    assert (one["batch_size"], one["pays"], one["num_speculative_tokens"]) == (1, True, 2)
    assert (sixteen["batch_size"], sixteen["pays"], sixteen["num_speculative_tokens"]) == (16, False, 0)
    assert sixteen["closest"] == 2 and sixteen["needed_tau"] == pytest.approx(2.25)  # 1.8 / 2.25 is above 1.5 / 2
    assert "No draft pays: eagle3 of 8,192 at K 2 comes closest, 0.80 times, and would need τ 2.25 there." in shown(
        report
    )


def test_what_the_noise_does_not_tell_from_nothing_is_said(tmp_path):
    path = write_costs(tmp_path / "costs.json", {1: 10.0}, {EIGHT: {1: {1: 12.0}}})
    content = json.loads(path.read_text())
    content["measured"][0]["rounds_ms"] = [[10.0], [11.0]]
    path.write_text(json.dumps(content))
    sure, unsure = (Measured("d", EIGHT, (rate,)) for rate in (0.5, 0.22))
    found = read_step_costs(path)
    assert "does not tell that from none" not in shown(serving_report(found, [sure]))
    assert "spread of 10% does not tell that from none" in shown(serving_report(found, [unsure]))


def test_too_few_drafts_do_not_tell_from_nothing_either(tmp_path):
    """Of 40 drafts 8 were accepted: τ 1.2 +- 0.063."""
    few, many = (Measured("d", EIGHT, (0.2,), drafts) for drafts in (40, 40000))
    assert few.error(1) == pytest.approx((0.2 * 0.8 / 40) ** 0.5)
    # Of 4 chains one each was accepted 0, 1, 2 and 3 tokens far: a variance of 1.25.
    assert Measured("d", EIGHT, (0.75, 0.5, 0.25), 4).error(3) == pytest.approx((1.25 / 4) ** 0.5)
    found = costs(tmp_path, {1: 10.0}, {EIGHT: {1: {1: 11.5}}})
    said = shown(serving_report(found, [few]))
    assert "K 1: 1.04 times. The costs' spread of 0% and τ's sampling error of 11% do not tell that from none" in said
    assert "from none" not in shown(serving_report(found, [many]))


def test_drafts_are_told_apart_by_their_folders(tmp_path):
    """Exports are all called plain."""
    found = costs(tmp_path, {1: 10.0}, {EIGHT: {1: {1: 12.0}}})
    drafts = [Measured(f"/runs/{name}/plain", EIGHT, (rate,)) for name, rate in (("a", 0.4), ("b", 0.5), ("b/b", 0.3))]
    said = shown(serving_report(found, drafts))
    assert "Best: eagle3 of 8,192 (runs/b/plain), K 1: 1.25 times." in said
    assert "(a/plain)" in said and "(b/b/plain)" in said
    said = shown(serving_report(found, drafts[:1]))
    assert "Best: eagle3 of 8,192, K 1" in said and "eagle3 of 8,192 (plain)" in said


def test_what_the_other_family_would_need(tmp_path):
    """At its best K: where it asks least of every token."""
    drafts = {EIGHT: {1: {1: 12.0, 2: 13.0}}, ONE: {1: {1: 12.0, 2: 16.0}}}
    found = costs(tmp_path, {1: 10.0}, drafts)
    measured = Measured("d", EIGHT, (0.5, 0.3))
    (choice,) = choose(found, [measured])
    (asked,) = choice.needs
    worth = 1.8 / 1.3
    assert asked.shape == ONE and asked.num_speculative_tokens == 1
    assert asked.tau == pytest.approx(worth * 1.2) and asked.rate == pytest.approx(worth * 1.2 - 1)
    # K 2 asks for a rate r with r + r r = worth * 1.6 - 1, which is more.
    assert rate_of(worth * 1.6, 2) > asked.rate
    assert f"eagle1 of 49,152 would be worth more than that from τ {asked.tau:.2f} at K 1" in shown(
        serving_report(found, [measured])
    )
    # No draft of K tokens has a τ above K + 1.
    assert rate_of(2.0, 1) == pytest.approx(1.0) and rate_of(2.1, 1) is None
    assert need(costs(tmp_path, {1: 10.0}, {ONE: {1: {1: 25.0}}}), ONE, 1, 1.0) is None


def test_what_was_not_measured_is_not_called_hopeless(tmp_path):
    """ONE at batch 1 alone and too dear there, TWO at K 1 alone and too dear there."""
    drafts = {
        EIGHT: {batch: {1: 12.0, 2: 13.0} for batch in (1, 32)},
        ONE: {1: {1: 25.0, 2: 40.0}},
        TWO: {1: {1: 11.0, 2: 12.0}, 32: {1: 25.0}},
    }
    found = costs(tmp_path, {1: 10.0, 32: 10.0}, drafts)
    one, many = choose(found, [Measured("d", EIGHT, (0.5, 0.3))])
    assert (one.never, one.gaps) == ([ONE], []) and [asked.shape for asked in one.needs] == [TWO]
    assert (many.never, many.needs) == ([], [])
    assert many.gaps == [Gap(ONE, [1, 2], True), Gap(TWO, [2], False)]
    report = serving_report(found, [Measured("d", EIGHT, (0.5, 0.3))])
    json.dumps(report)
    first, second = shown(report).split("batch 32")
    assert "eagle1 of 49,152 could not be worth more than that at any K up to 2, however much were accepted" in first
    assert "was not measured" not in first and "could not be worth more than that at any K" not in second
    assert "eagle1 of 49,152 was not measured at this batch size, so nothing is said of it" in second
    assert "eagle3 of 2,048 was not measured at K 2 with this batch size; at the others it could not be" in second
    assert "What was not measured is added by python -m eagle.vllm.step_costs" in second
    # So is a draft whose acceptance is known: nothing weighs it at batch 32.
    both = [Measured("d", EIGHT, (0.5, 0.3)), Measured("e", ONE, (0.9, 0.9))]
    assert Gap(ONE, [1, 2], True) in choose(found, both)[1].gaps


def test_a_batch_size_at_which_the_draft_was_not_timed_is_named(tmp_path):
    drafts = {EIGHT: {1: {1: 12.0}, 16: {1: 12.0}}, ONE: {1: {1: 14.0}}}
    found = costs(tmp_path, {1: 10.0, 16: 10.0}, drafts)
    report = serving_report(found, [Measured("d", ONE, (0.9,))])
    assert [one["batch_size"] for one in report["batches"]] == [1] and report["not_judged"] == [16]
    said = shown(report)
    assert "batch 16: no draft whose acceptance is known was measured there, so nothing is said of it." in said
    assert "What was not measured is added by python -m eagle.vllm.step_costs" in said
    both = serving_report(found, [Measured("d", ONE, (0.9,)), Measured("e", EIGHT, (0.5,))])
    assert both["not_judged"] == [] and "no draft whose acceptance" not in shown(both)


def test_measured_drafts_are_a_real_choice(tmp_path):
    drafts = {EIGHT: {1: {1: 12.0}}, ONE: {1: {1: 14.0}}}
    found = costs(tmp_path, {1: 10.0}, drafts)
    report = serving_report(found, [Measured("a", EIGHT, (0.4,)), Measured("b", ONE, (0.9,))])
    (choice,) = report["batches"]
    assert (choice["draft"], choice["family"], choice["needs"]) == ("b", "eagle1", [])
    assert [one["draft"] for one in choice["curves"]] == ["b", "a"]


def reply(tokens: list[int], accepted: list[int]) -> Reply:
    steps = [Step(count, count + 1, (), 0.0, 0.0) for count in accepted]
    return Reply("1", "", 1, 4, Generation(tokens, steps), None)


def test_a_smaller_vocabulary_ends_chains_at_the_tokens_it_has_not():
    order = by_frequency(np.array([0, 9, 3, 9, 1, 5]), [1, 3, 4, 5])
    assert order.tolist() == [1, 3, 5, 4]  # 2 is not the draft's own
    assert by_frequency(np.array([1, 2]), None).tolist() == [1, 0]
    # Behind the first token 7: [1 3] accepted, 5 the target's; [4] accepted, 9 the target's; nothing, 1 the target's.
    one = reply([7, 1, 3, 5, 4, 9, 1], [2, 1, 0])
    assert cut([one], 2, {1, 3, 4, 5}) == pytest.approx([2 / 3, 1 / 3])
    assert cut([one], 2, {1, 3}) == pytest.approx([1 / 3, 1 / 3])  # 4 is no longer drafted
    assert cut([one], 2, {3, 4}) == pytest.approx([1 / 3, 0])  # and nothing behind the 1 either
    # A chain that goes on behind the reply's end counts as it does in what was measured.
    assert cut([reply([7, 1, 3], [2, 2])], 2, {1, 3}) == [1.0, 1.0]
    assert cut([reply([7, 1, 3, 5, 1], [2, 2])], 2, {1, 3}) == [1.0, 1.0]
    assert cut([reply([7, 1, 3, 5, 4], [2, 2])], 2, {1, 3}) == [0.5, 0.5]
    assert by_coverage([0.5, 0.4], [[1, 1, 3, 5], [9, 9]], {1, 3, 5}, {1, 3}) == pytest.approx([0.375, 0.225])


def test_a_smaller_vocabulary_that_wins_is_called_an_estimate(tmp_path):
    small = shape("eagle3", 2)
    large, another = shape("eagle3", 4), shape("eagle3", 3, "another layer")
    drafts = {large: {1: {1: 14.0}}, small: {1: {1: 11.0}}, another: {1: {1: 1.0}}}
    found = costs(tmp_path, {1: 10.0}, drafts)
    order = np.array([1, 3, 5, 4])
    one = reply([7, 1, 9, 3, 9, 4, 9, 1], [1, 1, 1, 0])
    measured = Measured("d", large, (0.75,))
    estimates = smaller(measured, found.shapes, order, [one.drafted.tokens], [one])
    assert [(draft.shape, draft.accepted) for draft in estimates] == [(small, (0.5,))]
    report = serving_report(found, [measured, *estimates])
    (choice,) = report["batches"]
    assert choice["draft_vocab_size"] == 2 and choice["is_estimate"]  # 1.5 / 1.1 is above 1.75 / 1.4
    assert "Best: eagle3 of 2, K 1: 1.36 times, an estimate." in shown(report)
    assert "eagle3 of 2: an estimate: its tokens are 37.5% of these replies (4: 50.0%)" in shown(report)
    # Where nobody knows what it covers, only what it would need.
    (choice,) = serving_report(found, [measured])["batches"]
    assert choice["draft_vocab_size"] == 4
    assert {one["shape"]["draft_vocab_size"] for one in choice["needs"]} == {2, 3}
    # A measurement of that shape goes before the estimate.
    (choice,) = serving_report(found, [measured, *estimates, Measured("m", small, (0.0,))])["batches"]
    assert choice["draft_vocab_size"] == 4


class Model:
    """In place of an `Identity`."""

    folder = Path("here")

    def __init__(self, named: str) -> None:
        self.named = named

    def is_named(self, named: str) -> bool:
        return named == self.named


def test_costs_of_something_else_are_refused(tmp_path):
    found = costs(tmp_path, {1: 10.0}, {EIGHT: {1: {1: 12.0}}}, target="all-1")
    found.check_target(Model("all-1"))
    with pytest.raises(RequestError, match=r"of another model \(base\).*--base-path here --output OTHER"):
        found.check_target(Model("all-2"))
    found.check_engine(dtype="float32", tensor_parallel_size=1, hardware="a machine", vllm="0.32.0")
    with pytest.raises(RequestError, match=r"vllm is 0\.32\.0 there and 0\.33\.0 here; hardware is a machine there"):
        found.check_engine(vllm="0.33.0", hardware="another")
    with pytest.raises(RequestError, match="dtype is float32 there and bfloat16 here; tensor_parallel_size is 1 there"):
        found.check_engine(dtype="bfloat16", tensor_parallel_size=2)
    found.check_shape(EIGHT)
    with pytest.raises(RequestError, match=r"eagle1, 49,152 tokens.*It has eagle3, 8,192 tokens.*--draft-path"):
        found.check_shape(ONE)
    with pytest.raises(RequestError, match="eagle1, 49,152 tokens"):
        serving_report(found, [Measured("d", ONE, (0.5,))])


@pytest.mark.parametrize(
    ("content", "said"),
    [
        ({"tau": 2}, "not what python -m eagle.vllm.step_costs of this version writes"),
        ({"format": 1, "is_finished": False, "measured": []}, "is not finished.*it goes on"),
        (None, "has the base model alone and no draft"),
    ],
)
def test_files_that_hold_too_little_are_refused(tmp_path, content, said):
    path = write_costs(tmp_path / "costs.json", {1: 10.0}, {})
    if content is not None:
        path.write_text(json.dumps(content))
    with pytest.raises(RequestError, match=said):
        read_step_costs(path)


ASKED = asked_of([[1, 2], [3]], 64)
REPORT = {
    "base": "base", "target": "all-1", "draft": "other/run", "shape": ONE.to_json(), "asked": ASKED,
    "accepted_per_position": [0.5, 0.25], "dtype": "float32", "drafts": 70,
}  # fmt: skip


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ({}, None),
        ({"mode": "tree"}, "of --mode tree"),
        ({"target": "all-2"}, "of another base model"),
        ({"asked": asked_of([[1, 2], [4]], 64)}, "the prompts differ"),
        ({"asked": asked_of([[1, 2], [3]], 64, [(), ("And?",)])}, "the prompts, num_turns 2 there and 1 here differ"),
        ({"asked": asked_of([[1, 2], [3]], 64, (), Sampling(1.0, top_p=0.5))}, "temperature 1.0 .* top_p 0.5 there"),
        ({"asked": asked_of([[1, 2], [3]], 128)}, "max_new_tokens 128 there"),
        ({"dtype": "bfloat16"}, "measured in bfloat16, and the costs are those of float32.*--dtype float32"),
        ({"shape": None}, None),
    ],
)
def test_only_answers_to_the_same_are_compared(tmp_path, change, said):
    report = {**REPORT, **change}
    if change.get("shape", 1) is None:
        del report["shape"]
        said = "does not say what was asked"
    path = tmp_path / "report.json"
    path.write_text(json.dumps(report))
    if said is None:
        assert of_report(path, ASKED, "all-1", "float32") == Measured("other/run", ONE, (0.5, 0.25), 70)
        return
    with pytest.raises(RequestError, match=said):
        of_report(path, ASKED, "all-1", "float32")


def test_the_shape_is_what_decides_the_cost(tmp_path):
    target = load_config(make_target(tmp_path, layers=8))
    one, three = DRAFT_FAMILIES["eagle1"], DRAFT_FAMILIES["eagle3"]
    first = shape_of(one, one.config(target, None, DraftChoices()))
    assert first.draft_vocab_size == target.vocab_size
    small, same, other = (
        shape_of(three, three.config(target, None, DraftChoices(layers, size)))
        for layers, size in ((None, 64), ((1, 2, 3), 64), ((1, 2), 64))
    )
    assert small.draft_vocab_size == 64 and small == same != other and first.layer != small.layer
