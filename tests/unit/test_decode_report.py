"""From steps to the numbers of a report."""

import json
from types import SimpleNamespace

import pytest
import torch

from eagle.decode import generate, recommendation
from eagle.decode.acceptance_counts import Acceptance
from eagle.decode.drafter import DraftOptions, DynamicDrafter, StaticDrafter
from eagle.decode.evaluate import estimate_sizes
from eagle.decode.generate import Generation, SpeculativeDecoder, Step, generate_alone
from eagle.decode.picture import draw_report
from eagle.decode.recommendation import Estimate, fastest, lowest
from eagle.decode.replies import Reply
from eagle.decode.report import build_report, report_lines, summary
from eagle.decode.sampling import Sampling
from eagle.decode.tree import EAGLE1_PATHS, chain_paths
from tests.drafts import CPU, random_draft, random_eagle3_draft, tiny_target
from tests.tiny import make_target


def step(accepted: int, tried: int, order: tuple[int, ...]) -> Step:
    return Step(accepted, tried, order, draft_seconds=0.01, target_seconds=0.03)


CHAIN = [step(0, 1, ()), step(1, 2, (1,)), step(3, 3, (1, 2, 3)), step(2, 3, (1, 2))]


def test_acceptance_by_its_definitions():
    acceptance = Acceptance.of(CHAIN, depth=4)
    assert acceptance.tau() == 1 + 6 / 4
    assert acceptance.per_position() == [3 / 4, 2 / 4, 1 / 4, 0.0]
    assert acceptance.n_alpha() == [3 / 4, 2 / 3, 1 / 2, None]
    assert [acceptance.tau_of_first(nodes) for nodes in (1, 2, 3, 9)] == [1 + 3 / 4, 1 + 5 / 4, 1 + 6 / 4, 1 + 6 / 4]


def test_nothing_decoded():
    acceptance = Acceptance.of([], depth=2)
    assert (acceptance.tau(), acceptance.per_position(), acceptance.n_alpha()) == (1.0, [0.0, 0.0], [None, None])


MODES = {
    "chain": lambda sampling: StaticDrafter(chain_paths(3), CPU, sampling),
    "tree": lambda sampling: StaticDrafter(EAGLE1_PATHS, CPU, sampling),
    "dynamic tree": lambda sampling: DynamicDrafter(20, 4, 5),
}


@pytest.mark.parametrize("temperature", [0.0, 1.0])
@pytest.mark.parametrize("mode", MODES)
def test_rejections_of_tokens_outside_the_drafts_vocabulary(tmp_path, mode, temperature):
    """Recounted from the tokens: a step ends with the token that was not drafted."""
    target, sampling = tiny_target(make_target(tmp_path)), Sampling(temperature=temperature)
    vocabulary = torch.arange(1, target.config.vocab_size, 2)
    draft = random_eagle3_draft(target, vocabulary)
    result = SpeculativeDecoder(target, draft, MODES[mode](sampling), sampling).generate([5, 9, 33], 80)
    ends, at = [], 0
    for one in result.steps:
        at += one.accepted + 1
        ends.append((one.tried > one.accepted, at))
    known = [(is_rejected, result.tokens[end] % 2 == 0) for is_rejected, end in ends if end < len(result.tokens)]
    steps = result.steps[: len(known)]
    assert [one.is_outside for one in steps] == [is_rejected and is_even for is_rejected, is_even in known]
    if temperature == 0:
        assert result.tokens == generate_alone(target, [5, 9, 33], 80, sampling).tokens
    found = summary([Reply("p", "", 1, 3, result, None)], 5, frozenset(vocabulary.tolist()))
    assert found["draft_vocabulary"] == {
        "size": len(vocabulary),
        "coverage": sum(token % 2 for token in result.tokens) / 80,
        "rejected": sum(one.tried > one.accepted for one in result.steps),
        "rejected_outside": sum(one.is_outside for one in result.steps),
    }
    assert 0 < found["draft_vocabulary"]["rejected_outside"] < found["draft_vocabulary"]["rejected"]


def test_a_draft_of_all_tokens_has_no_vocabulary_of_its_own(tmp_path):
    target, greedy = tiny_target(make_target(tmp_path)), Sampling()
    every = torch.arange(target.config.vocab_size)
    for draft in (random_draft(target), random_eagle3_draft(target, every)):
        assert SpeculativeDecoder(target, draft, StaticDrafter(chain_paths(2), CPU, greedy), greedy).vocabulary is None


def reply(category: str, tokens: list[int], alone: list[int] | None, steps: list[Step]) -> Reply:
    other = None if alone is None else Generation(alone, [], 0.0, 4.0)
    return Reply("p", category, 1, 10, Generation(tokens, steps, 0.0, 2.0), other)


def full_report(replies: list[Reply], estimates: list[Estimate]) -> dict:
    report = build_report(replies, 3, greedy=True, estimates=estimates)
    extra = {"mode": "chain", "num_draft_tokens": 3, "temperature": 0.0, "dtype": "float32", "hardware": "cpu"}
    return report | extra | {"peak_memory_gb": 1.5, "skipped_prompts": []}


ESTIMATES = [Estimate(0, 0.0, 0.02, 1.0), Estimate(1, 0.005, 0.021, 1.75), Estimate(3, 0.015, 0.025, 2.5)]


def test_report_and_what_people_see(tmp_path):
    replies = [reply("code", [1, 2, 3, 4], [1, 2, 3, 4], CHAIN[:2]), reply("maths", [5, 6], [5, 7], CHAIN[2:])]
    report = full_report(replies, ESTIMATES)
    assert report["tau"] == 2.5 and report["categories"]["code"]["tau"] == 1.5
    assert report["tokens_per_s"] == 6 / 4 and report["baseline_tokens_per_s"] == 6 / 8
    assert report["speedup"] == 2.0
    assert report["identical_to_target"] is False and report["differing_replies"] == ["p turn 1"]
    assert report["categories"]["code"]["n_alpha"] == [0.5, 0.0, None]
    assert report["recommendation"]["num_draft_tokens"] == 1  # 67 tokens/s; K = 3 gives 62, none 50
    lines = "\n".join(report_lines(report))
    for expected in ("code", "maths", "all", "0-α 0.750", "differs from the target's own in 1 of 2", "<- fastest"):
        assert expected in lines
    assert report["draft_vocabulary"] is None and "vocabulary" not in lines
    json.dumps(report)
    picture = draw_report(report, tmp_path).read_text(encoding="utf-8")
    assert "τ = 2.50" in picture and "maths" in picture


def test_what_a_vocabulary_costs_is_said():
    outside = Step(1, 2, (1,), 0.01, 0.03, is_outside=True)
    replies = [reply("code", [1, 2, 3], None, [*CHAIN, outside]), reply("maths", [4], None, [])]
    report = build_report(replies, 3, greedy=True, estimates=[], vocabulary=frozenset({1, 2, 9}))
    assert report["draft_vocabulary"] == {"size": 3, "coverage": 0.5, "rejected": 4, "rejected_outside": 1}
    assert report["categories"]["maths"]["draft_vocabulary"]["coverage"] == 0
    extra = {"mode": "chain", "temperature": 0.0, "dtype": "float32", "hardware": "cpu", "peak_memory_gb": 1.0}
    lines = "\n".join(report_lines(report | extra | {"skipped_prompts": []}))
    assert "3 tokens are 50.0% of the output; of 4 rejections 1 are of a token that is not among them" in lines


def test_without_the_target_alone_nothing_is_compared(tmp_path):
    report = full_report([reply("", [1, 2], None, CHAIN)], [])
    assert report["speedup"] is None and report["identical_to_target"] is None
    assert report["recommendation"] is None
    assert "not compared" in "\n".join(report_lines(report))
    assert "multiples of the target" not in draw_report(report, tmp_path).read_text(encoding="utf-8")


@pytest.mark.parametrize("nodes, said", [(0, "no speculation is fastest"), (3, "may be faster still")])
def test_the_ends_of_the_curve_are_explained(nodes, said):
    slow = [Estimate(one.nodes, one.draft_seconds, 0.001 if one.nodes == nodes else 1.0, one.tau) for one in ESTIMATES]
    assert fastest(slow).nodes == nodes
    assert said in "\n".join(report_lines(full_report([reply("", [1, 2], [1, 2], CHAIN)], slow)))


class DrawnChain(DraftOptions):
    """A chain whose tokens are drawn, as a static tree's are."""

    def drafter(self, device, sampling, nodes=None):
        return StaticDrafter(chain_paths(self.count if nodes is None else nodes), device, sampling)


@pytest.mark.parametrize(
    ("drafting", "temperature", "expected"),
    [
        (DraftOptions("chain", 3), 0.0, [(0, 0), (0, 0)]),
        (DraftOptions("chain", 3), 1.0, [(0, 1), (0, 1)]),  # of the likeliest tokens: only the target draws
        (DrawnChain("chain", 3), 1.0, [(0, 1), (3, 101)]),
    ],
)
def test_sampling_and_acceptance_have_their_share_of_the_estimate(
    tmp_path, monkeypatch, drafting, temperature, expected
):
    """By a clock that a distribution moves by 1 and the acceptance rule by 100, and nothing else."""
    target, sampling, now = tiny_target(make_target(tmp_path)), Sampling(temperature=temperature), [0.0]

    def costs(ticks, work):
        def counted(*args):
            now[0] += ticks
            return work(*args)

        return counted

    monkeypatch.setattr(recommendation, "time", SimpleNamespace(perf_counter=lambda: now[0]))
    monkeypatch.setattr(Sampling, "distribution", costs(1, Sampling.distribution))
    monkeypatch.setattr(generate, "settle", costs(100, generate.settle))
    decoder = SpeculativeDecoder(target, random_draft(target), drafting.drafter(CPU, sampling), sampling)
    found = estimate_sizes(decoder, drafting, [reply("", [1, 2], None, CHAIN)])
    alone, *_, longest = found
    assert [one.nodes for one in found] == [0, 1, 2, 3]
    assert [(one.draft_seconds, one.target_seconds) for one in (alone, longest)] == expected


def test_costs_survive_a_busy_machine():
    """The quickest round counts, and a size is never dearer than a larger one."""
    assert lowest([[5.0, 9.0, 4.0], [3.0, 6.0, 7.0]]) == [3.0, 4.0, 4.0]
