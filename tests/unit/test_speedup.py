"""benchmarks/speedup.py: what several runs of verify come to."""

from __future__ import annotations

import itertools
import json
import sys
from pathlib import Path
from typing import Any

import pytest

from benchmarks import judging, speedup
from eagle.errors import RequestError, WorkError
from eagle.vllm.export import installed_vllm
from tests.tiny import make_target
from tests.unit.exports import make_draft


def report(words: list[str], number: int) -> dict[str, Any]:
    """As verify writes it; every run is a little quicker than the one before."""
    told = dict(itertools.pairwise(words))
    k = int(told["--num_speculative_tokens"])
    return {
        "speed_ratio": 1.2 + number / 10,
        "tokens_per_second": 60.0 + 5 * number,
        "tokens_per_second_without": 50.0,
        "tau": 1.5,
        "accepted_per_position": [0.4, 0.1, 0.02][:k],
        "identical": told["--dtype"] == "float32",
        "prompts": int(told.get("--num_prompts", 40)),
        "tokens": 700,
        "vllm": "0.32.0",
        "device": "cpu",
        "dtype": "bfloat16",
        "max_new_tokens": int(told["--max_new_tokens"]),
        "batch_size": 1,
    }


@pytest.fixture
def asked(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> tuple[list[str], list[list[str]]]:
    """The command's words, and those of every verify that it runs, which succeeds."""
    base = make_target(tmp_path / "base")
    draft = make_draft(tmp_path / "draft", base)
    runs: list[list[str]] = []

    def call(words: list[object], log: Path) -> None:
        said = [str(word) for word in words]
        runs.append(said)
        Path(said[said.index("--output") + 1]).write_text(json.dumps(report(said, len(runs))))

    monkeypatch.setattr(judging, "call", call)
    monkeypatch.setattr(judging, "vllm_of", lambda python: "0.32.0+cpu")
    words = ["--base-path", str(base), "--draft-path", str(draft), "--workdir", str(tmp_path / "work")]
    return [*words, "--engine_python", "python"], runs


def test_the_table_is_of_all_runs(asked, capsys, tmp_path):
    words, runs = asked
    assert speedup.main([*words, "--runs", "2", "--num_speculative_tokens", "1", "3"]) == 0
    assert len(runs) == 6  # of either K two in bfloat16 and one in float32
    assert [run[run.index("--dtype") + 1] for run in runs] == ["auto", "auto", "float32"] * 2
    said = capsys.readouterr().out
    assert "no draft      50.0 (50.0 to 50.0)" in said
    assert "draft, K = 1  67.5 (65.0 to 70.0)     1.35 (1.30 to 1.40)" in said
    assert "draft, K = 3  82.5 (80.0 to 85.0)     1.65 (1.60 to 1.70)" in said
    assert "float32: all 12 replies identical for every K" in said
    found = json.loads((tmp_path / "work" / "speedup.json").read_text())
    assert [one["ratio"] for one in found["chains"]] == [
        {"mean": pytest.approx(1.35), "least": pytest.approx(1.3), "most": 1.4},
        {"mean": pytest.approx(1.65), "least": pytest.approx(1.6), "most": 1.7},
    ]
    picture = (tmp_path / "work" / "speedup.svg").read_text()
    assert "draft, K = 3" in picture and "1.65 times" in picture


def test_what_was_measured_is_not_measured_again_unless_the_draft_is_another(asked, tmp_path):
    words, runs = asked
    speedup.main([*words, "--runs", "1"])
    speedup.main([*words, "--runs", "2"])
    assert len(runs) == 3
    config = tmp_path / "draft" / "config.json"
    config.write_text(config.read_text() + "\n")
    speedup.main([*words, "--runs", "1"])
    assert len(runs) == 5
    speedup.main([*words, "--runs", "1", "--num_prompts", "7"])
    assert runs[-1][runs[-1].index("--num_prompts") + 1] == "7"  # of the float32 run, which takes twelve at most


def test_another_template_is_measured_anew(asked, tmp_path):
    words, runs = asked
    speedup.main([*words, "--runs", "1"])
    (tmp_path / "base" / "chat_template.jinja").write_text("{{ messages[0]['content'] }}")
    speedup.main([*words, "--runs", "1"])
    assert len(runs) == 4


def test_what_a_failed_run_wrote_is_in_nobodys_way(asked, monkeypatch, tmp_path):
    """verify writes the report of a failure too, and overwrites no file."""
    words, runs = asked
    succeeds = judging.call

    def fails(words: list[object], log: Path) -> None:
        Path(str(words[words.index("--output") + 1])).write_text("{}")
        raise WorkError("the engine died")

    def call(words: list[object], log: Path) -> None:
        assert not Path(str(words[words.index("--output") + 1])).exists()
        succeeds(words, log)

    monkeypatch.setattr(judging, "call", fails)
    with pytest.raises(WorkError, match="died"):
        speedup.main([*words, "--runs", "1"])
    monkeypatch.setattr(judging, "call", call)
    assert speedup.main([*words, "--runs", "1"]) == 0 and len(runs) == 2


def test_runs_of_different_engines_are_not_mixed(asked, tmp_path, monkeypatch):
    words, runs = asked
    speedup.main([*words, "--runs", "1"])
    (first,) = (tmp_path / "work").glob("k3-run1-*.json")
    first.write_text(first.read_text().replace('"cpu"', '"A Card"'))
    with pytest.raises(RequestError, match=r"holds runs of vLLM 0.32.0 on A Card and of vLLM 0.32.0 on cpu"):
        speedup.main([*words, "--runs", "2"])
    (exact,) = (tmp_path / "work").glob("k3-float32-*.json")
    exact.write_text(exact.read_text().replace('"cpu"', '"A Card"'))
    assert speedup.main([*words, "--runs", "1"]) == 0, "all of them are of that card"
    with pytest.raises(RequestError, match=r"holds runs of .* on A Card and of"):
        speedup.main([*words, "--runs", "1", "--num_speculative_tokens", "3", "1"])
    before = len(runs)
    monkeypatch.setattr(judging, "vllm_of", lambda python: "0.33.0")
    with pytest.raises(RequestError, match=r"k3-run1-.* was measured with vLLM 0.32.0, and --engine_python has 0.33.0"):
        speedup.main([*words, "--runs", "1"])
    assert len(runs) == before


@pytest.mark.parametrize(
    ("python", "why"),
    [("nowhere/python", r"cannot be run \(.*No such file"), (sys.executable, "there is no vLLM in that")],
)
def test_what_was_measured_does_not_stand_for_an_engine_that_is_not_there(tmp_path, python, why):
    if installed_vllm() and python == sys.executable:
        pytest.skip("there is one here")
    with pytest.raises(RequestError, match=f"--engine_python {python}.*{why}"):
        judging.verified(Path(python), tmp_path, tmp_path, tmp_path / "report.json")


def test_the_machine_is_the_engines(asked, tmp_path):
    """Which may see no card where this process does, or the other way round."""
    words, _ = asked
    speedup.main([*words, "--runs", "1"])
    assert json.loads((tmp_path / "work" / "speedup.json").read_text())["hardware"].startswith("cpu ")
    for file in (tmp_path / "work").glob("k3-*.json"):
        file.write_text(file.read_text().replace('"cpu"', '"A Card"'))
    speedup.main([*words, "--runs", "1"])
    assert json.loads((tmp_path / "work" / "speedup.json").read_text())["hardware"] == "A Card"


def test_a_run_that_fails_ends_it(asked, monkeypatch, tmp_path):
    words, _ = asked

    def fails(words: list[object], log: Path) -> None:
        raise WorkError("The output with the draft differs from the output without it, in float32.")

    monkeypatch.setattr(judging, "call", fails)
    with pytest.raises(WorkError, match="differs"):
        speedup.main(words)
    assert not (tmp_path / "work" / "speedup.json").exists()
    with pytest.raises(RequestError, match="expected 1 or more"):
        speedup.main([*words, "--runs", "0"])
