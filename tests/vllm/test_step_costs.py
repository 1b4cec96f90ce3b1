"""What steps cost in a real engine: a far larger head costs more, and verify weighs a draft by the file."""

from __future__ import annotations

import dataclasses
import json
import os
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

from eagle.decode.step_costs import read_step_costs
from eagle.drafts.choices import DraftChoices
from eagle.drafts.families import DRAFT_FAMILIES
from eagle.drafts.saved import save_draft
from eagle.entry import run
from eagle.target.config import load_config
from eagle.vllm import step_costs
from eagle.vllm import verify as verify_vllm
from eagle.vllm.engine import EngineRequest, EngineResult, run_engines
from eagle.vllm.export import export
from tests.tiny import make_target

SMALL, LARGE = 64, 65536


@pytest.fixture(scope="module", autouse=True)
def one_core() -> Iterator[None]:
    """Threads that wait for each other take a hundred times as long where other work has one of their cores."""
    allowed = os.sched_getaffinity(0)
    os.sched_setaffinity(0, {min(allowed)})
    yield
    os.sched_setaffinity(0, allowed)


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Whose head, 65,536 rows over a width of 512, is most of what it computes."""
    return make_target(tmp_path_factory.mktemp("costs") / "base", layers=2, hidden=512, vocab_size=LARGE, tied=True)


@pytest.fixture(scope="module")
def costs(base: Path) -> Path:
    output = base.parent / "costs.json"
    words = ["--base-path", base, "--output", output, "--drafts", "eagle3", "--draft_vocab_sizes", SMALL, LARGE]
    words += ["--aux_layers", "0,1", "--num_speculative_tokens", 1, "--batch_sizes", 1, 2, "--rounds", 1]
    words += ["--dtype", "float32", "--context", 16]
    assert run(lambda: step_costs.main([str(word) for word in words])) == 0
    return output


def test_a_larger_head_costs_more(costs: Path) -> None:
    found = read_step_costs(costs)
    print(json.dumps(json.loads(costs.read_text())["measured"], indent=None))
    small, large = sorted(found.shapes, key=lambda shape: shape.draft_vocab_size)
    assert (small.draft_vocab_size, large.draft_vocab_size, found.batch_sizes) == (SMALL, LARGE, [1, 2])
    for batch in (1, 2):
        assert found.alone(batch).ms > 0
        cheap, dear = found.cost(small, 1, batch), found.cost(large, 1, batch)
        assert cheap and dear and not cheap.is_between and not dear.is_between
        assert 0 < cheap.ms < dear.ms and found.alone(batch).ms < dear.ms, batch
    assert found.engine["device"] == "cpu" and found.engine["dtype"] == "float32"


def test_verify_weighs_by_them(
    base: Path, costs: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """A draft that nothing has trained is accepted nowhere, and with so large a head it costs much: it does not pay."""
    family, target = DRAFT_FAMILIES["eagle3"], load_config(base)
    network = family.build(
        family.config(target, None, DraftChoices((0, 1), LARGE)), torch.empty(LARGE, 512, device="meta")
    )
    save_draft(network, tmp_path / "draft", network.own_state())
    draft = export(base, tmp_path / "draft", tmp_path / "export", "plain")["plain"]
    answers: list[Iterator[EngineResult]] = []

    def answer(request: EngineRequest) -> EngineResult:
        """Both engines in one process, which starts in a third of the time."""
        if request.draft:
            answers.append(run_engines([request, dataclasses.replace(request, draft=None)], in_process=True))
        return next(answers[0])

    monkeypatch.setattr(verify_vllm, "run_engine", answer)
    words = ["--base-path", base, "--draft-path", draft, "--num_prompts", 2, "--num_speculative_tokens", 1]
    words += ["--max_new_tokens", 8, "--dtype", "float32", "--step_costs", costs, "--output", tmp_path / "report.json"]
    code = run(lambda: verify_vllm.main([str(word) for word in words]))
    shown = capsys.readouterr()
    print(shown.out)
    assert code == 1 and "None of" in shown.err
    one, two = json.loads((tmp_path / "report.json").read_text())["serving"]["batches"]
    assert (one["batch_size"], two["batch_size"], one["pays"], two["pays"]) == (1, 2, False, False)
    assert one["needed_tau"] > 1 and [len(curve["points"]) for curve in one["curves"]] == [1]
    assert "No draft pays: eagle3 of 65,536" in shown.out
