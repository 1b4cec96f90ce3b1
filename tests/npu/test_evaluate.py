"""Decoding and step 5 on simulated cards: the target's own output in every mode, the CPU's numbers, checked exports."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from eagle.decode import evaluate, recommendation
from eagle.decode.drafter import MODES
from eagle.drafts.families import DRAFT_FAMILIES
from eagle.drafts.saved import BEST, resolve_pointer, save_draft
from eagle.train.checkpoint import point
from tests.e2e.commands import ask
from tests.e2e.conftest import draft_of
from tests.npu.commands import TARGETS, on_npu, processes, several

QUICK = ["--max_new_tokens", 12, "--num_prompts", 2, "--num_turns", 1, "--dtype", "float32"]

Runs = Callable[[str, str], Path]


def report_of(folder: Path) -> dict:
    return json.loads((folder / "report.json").read_text(encoding="utf-8"))


def nodes(mode: str) -> list[object]:
    return ["--mode", mode, "--num_draft_tokens", 3 if mode == "chain" else 9]


@pytest.fixture
def base(target: str, request: pytest.FixtureRequest) -> Path:
    return request.getfixturevalue(target)


@pytest.mark.parametrize("target", TARGETS)
def test_every_mode(
    target: str, family: str, base: Path, runs: Runs, tmp_path: Path, capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:  # fmt: skip
    """Greedy, on one card and spread over two, and sampled."""
    monkeypatch.setattr(recommendation, "_SECONDS", 0.0)
    monkeypatch.setattr(recommendation, "_LEAST_ROUNDS", 1)
    common = ["--base-path", base, "--draft-path", runs(target, family), *QUICK]
    lines = {}
    for mode in MODES:
        lines[mode, "greedy"] = nodes(mode)
        sampling = ["--temperature", 1, "--top_k", 20, "--top_p", 0.9, "--seed", 3]
        lines[mode, "sampled"] = [*nodes(mode), *sampling, "--no_baseline"]
    for mode in ("chain", "dynamic_tree"):
        lines[mode, "spread"] = [*nodes(mode), "--spread"]
    lines["chain", "again"] = lines["chain", "sampled"]
    words = [[*common, *line, "--output", tmp_path / "-".join(name)] for name, line in lines.items()]
    answers = several("eagle.decode.evaluate", words, tmp_path, cards=2, log=tmp_path / "log")
    assert [answer.code for answer in answers] == [0] * len(lines), [answer.err for answer in answers]
    reports = {name: report_of(tmp_path / "-".join(name)) for name in lines}
    for (mode, how), report in reports.items():
        assert report["hardware"].startswith("npu Ascend910B, simulated, card "), report["hardware"]
        assert report["identical_to_target"] is (True if how in ("greedy", "spread") else None), (mode, how)
        assert report["peak_memory_gb"] > 0
    again, sampled = ((tmp_path / name / "replies.jsonl").read_text() for name in ("chain-again", "chain-sampled"))
    assert again == sampled, "a seed repeats what it gave"
    for mode in ("chain", "dynamic_tree"):
        assert reports[mode, "spread"]["tau"] == reports[mode, "greedy"]["tau"]
    for mode in MODES:
        on_cpu = tmp_path / f"{mode}-cpu"
        answer = ask(evaluate.main, capsys, *common, *nodes(mode), "--device", "cpu", "--output", on_cpu)
        assert answer.code == 0, answer.err
        # in float32 only a near tie could be decided otherwise
        assert report_of(on_cpu)["tau"] == pytest.approx(reports[mode, "greedy"]["tau"], abs=0.1)
    (process,) = processes(tmp_path / "log")
    assert list(process.cards) == [0, 1], "the layers were spread"


def test_an_untrained_draft_of_qwen2_in_bfloat16(qwen: Path, tmp_path: Path) -> None:
    """By the documented command, on a card that is not the first."""
    save_draft(draft_of(qwen), tmp_path / "run" / "state_1")
    point(tmp_path / "run", BEST, "state_1")
    words = ["--base-path", qwen, "--draft-path", tmp_path / "run", *QUICK, "--dtype", "bfloat16"]
    on_npu("-m", "eagle.evaluate", *words, "--output", tmp_path / "out", log=tmp_path / "log",
           ASCEND_RT_VISIBLE_DEVICES="5")  # fmt: skip
    report = report_of(tmp_path / "out")
    assert report["hardware"] == "npu Ascend910B, simulated, card 5" and report["dtype"] == "bfloat16"
    assert report["tau"] >= 1 and report["tokens"] == sum(
        json.loads(line)["tokens"] for line in (tmp_path / "out" / "replies.jsonl").read_text().splitlines()
    )
    (process,) = processes(tmp_path / "log")
    assert list(process.cards) == [5] and process.cards[5]["kernels"] > 1000


@pytest.mark.parametrize("target", TARGETS)
def test_both_layouts_are_exported_and_checked(
    target: str, family: str, base: Path, runs: Runs, tmp_path: Path
) -> None:
    run = runs(target, family)
    weights = "model.safetensors" if target == "llama" else "model.safetensors.index.json"
    answer = on_npu(
        "convert_eagle_ckpt_to_vllm_compatible.py", "--base-path", base, "--draft-path", run, "--base-weight-name",
        weights, "--draft-weight-name", "model.safetensors", "--output-path", tmp_path / "out",
        "--layout", "both",
    )  # fmt: skip
    assert answer.out.count("checked") == 2
    trained = load_file(resolve_pointer(run) / "model.safetensors")
    trained.pop("embed_tokens.weight")  # an export has the base model's own
    layouts = DRAFT_FAMILIES[family].layouts
    assert sorted(path.name for path in (tmp_path / "out").iterdir() if path.is_dir()) == sorted(layouts)
    for layout in layouts:
        exported = load_file(tmp_path / "out" / layout / "model.safetensors")
        for name in exported.keys() & trained.keys():
            assert torch.equal(exported[name], trained[name].to(exported[name].dtype)), (layout, name)
        assert exported.keys() & trained.keys()
