"""``eagle.evaluate --step_costs``: which K, draft vocabulary and kind of draft pay in the engine of the costs."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch

from eagle.decode import evaluate
from eagle.decode.smaller_vocabulary import order_of
from eagle.decode.step_costs import Shape
from eagle.drafts.saved import save_draft
from eagle.target.identity import Identity
from eagle.target.weights import Weights
from tests.costs import write_costs
from tests.drafts import random_eagle3_draft, tiny_target
from tests.e2e.commands import ask

QUICK = ("--max_new_tokens", 8, "--num_prompts", 2, "--num_turns", 1, "--dtype", "float32", "--device", "cpu")


@pytest.fixture(scope="module")
def draft(llama: Path, store: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """An EAGLE-3 draft that chooses among the store's 64 most frequent tokens, and knows nothing."""
    folder = tmp_path_factory.mktemp("draft")
    target = tiny_target(llama)
    order = order_of(store, Identity(llama, Weights(llama)), target.config.vocab_size, None)
    network = random_eagle3_draft(target, torch.from_numpy(order[:64].copy()).sort().values)
    save_draft(network, folder, network.own_state())
    return folder


def test_a_report_says_what_pays(llama, store, draft, tmp_path, capsys):
    words = (*QUICK, "--base-path", llama, "--draft-path", draft, "--num_draft_tokens", 2, "--no_baseline")
    plain = ask(evaluate.main, capsys, *words, "--output", tmp_path / "plain")
    assert plain.code == 0, plain.err
    assert "Serving" not in plain.out
    other = tmp_path / "plain" / "report.json"
    report = json.loads(other.read_text(encoding="utf-8"))
    mine = Shape(**report["shape"])
    assert (mine.family, mine.draft_vocab_size) == ("eagle3", 64)
    small = Shape("eagle3", 32, mine.layer)
    costs = write_costs(
        tmp_path / "costs.json",
        {1: 10.0, 4: 20.0},
        {mine: {1: {1: 5.0, 2: 6.0}, 4: {1: 90.0, 2: 95.0}}, small: {1: {1: 20.0, 2: 30.0}, 4: {1: 80.0, 2: 81.0}}},
        report["target"],
    )
    weighed = (*words, "--step_costs", costs, "--tmpdir", store, "--against", other, "--output", tmp_path / "weighed")
    answer = ask(evaluate.main, capsys, *weighed)
    assert answer.code == 0, answer.err
    found = json.loads((tmp_path / "weighed" / "report.json").read_text(encoding="utf-8"))
    one, four = found["serving"]["batches"]
    assert one["pays"] and one["draft_vocab_size"] == 64 and not four["pays"]
    taus = [1 + sum(found["accepted_per_position"][:count]) for count in (1, 2)]
    (curve,) = [one for one in one["curves"] if one["draft"] == str(draft) and not one["estimate"]][:1]
    assert [point["speedup"] for point in curve["points"]] == pytest.approx([taus[0] * 2, taus[1] * 10 / 6])
    assert len(one["curves"]) == 3  # this, the other report's, and the smaller vocabulary as an estimate
    assert "No draft pays" in answer.out and "(estimate)" in answer.out
    assert "eagle3 of 32: an estimate: its tokens are" in answer.out


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (("--against", "x.json"), "it goes with --step_costs"),
        (("--step_costs", "costs.json", "--mode", "tree"), "vLLM drafts a chain, and this is --mode tree"),
        (("--step_costs", "costs.json"), "dtype is bfloat16 there and float32 here"),
        (("--step_costs", "other.json"), "is of another model"),
        (("--step_costs", "missing.json"), "no such file"),
    ],
)
def test_refusals(llama, draft, tmp_path, capsys, monkeypatch, words, said):
    monkeypatch.chdir(tmp_path)
    named = Identity(llama, Weights(llama)).current
    drafts = {Shape("eagle3", 64, "any"): {1: {1: 1.0}}}
    write_costs(tmp_path / "costs.json", {1: 1.0}, drafts, named, dtype="bfloat16")
    write_costs(tmp_path / "other.json", {1: 1.0}, drafts, "all-other")
    answer = ask(evaluate.main, capsys, *QUICK, "--base-path", llama, "--draft-path", draft, *words)
    assert answer.code == 2 and said in " ".join(answer.error.split())


def test_a_store_of_another_model_is_refused(llama, qwen, store):
    with pytest.raises(ValueError, match="is of another base model"):
        order_of(store, Identity(qwen, Weights(qwen)), 424, None)
