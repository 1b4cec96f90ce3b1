"""`eagle.vllm.verify` without a vLLM: refusals, the report, the verdict, an engine's last words."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path

import pytest

from eagle.data.loss_mask import load_encoder
from eagle.data.prompts import Prompt, encode_first_turn
from eagle.entry import run
from eagle.errors import RequestError
from eagle.target.config import load_config
from eagle.vllm import engine as vllm_engine
from eagle.vllm import report as vllm_report
from eagle.vllm import verify as verify_vllm
from eagle.vllm.engine import EngineError, EngineRequest, EngineResult, last_words, read_counters
from eagle.vllm.export import export
from eagle.vllm.serving import Serving
from tests.oracle import Shape, write_pair
from tests.oracle3 import write_oracle

RESULT = EngineResult(
    outputs=[[5, 6, 7, 8], [9, 10]],
    seconds=2.0,
    drafts=4,
    drafted=12,
    accepted=6,
    accepted_per_position=[3, 2, 1],
    dtype="float32",
    device="cpu",
    vllm="0.32.0",
    torch="2.13.0",
)


@pytest.fixture(scope="module")
def pair(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    root = tmp_path_factory.mktemp("verify")
    target, draft = write_pair(root, Shape())
    export(target, draft, root / "export", "both")
    return target, root / "export"


def call(base: Path, draft: Path, *arguments: object) -> int:
    argv = ["--base-path", base, "--draft-path", draft, "--num_prompts", 2, *arguments]
    return run(lambda: verify_vllm.main([str(argument) for argument in argv]))


def engines(monkeypatch: pytest.MonkeyPatch, with_draft: EngineResult, without: EngineResult) -> list[EngineRequest]:
    """Answer in the engines' place; the requests they got."""
    asked: list[EngineRequest] = []

    def answer(request: EngineRequest) -> EngineResult:
        asked.append(request)
        return without if request.draft is None else with_draft

    monkeypatch.setattr(verify_vllm, "installed_vllm", lambda: "0.32.0")
    monkeypatch.setattr(verify_vllm, "run_engine", answer)
    return asked


def test_a_missing_vllm_is_said_at_once(
    pair: tuple[Path, Path], monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(verify_vllm, "installed_vllm", lambda: None)
    assert call(*pair) == 2
    assert "vLLM is not installed" in capsys.readouterr().err
    monkeypatch.setattr(verify_vllm, "installed_vllm", lambda: "0.8.5")
    assert call(*pair) == 2
    assert "0.9 or newer" in capsys.readouterr().err


def test_both_engines_get_the_same_tokens_and_all_is_reported(
    pair: tuple[Path, Path], monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    asked = engines(monkeypatch, RESULT, dataclasses.replace(RESULT, seconds=3.0))
    assert call(*pair, "--output", tmp_path / "report.json") == 0
    first, second = asked
    assert first.draft == str(pair[1].resolve() / "v1")  # found in an export of both layouts
    assert dataclasses.replace(first, draft=None) == second
    assert all(prompt for prompt in first.prompts)
    assert first.stop_token_ids == [2] and not first.enforce_eager
    shown = capsys.readouterr().out
    assert "loaded    yes, by vLLM 0.32.0" in shown
    assert "identical with and without the draft (6 tokens)" in shown
    assert "1: 0.750  2: 0.500  3: 0.250   (6 of 12 drafted tokens, 0.500)" in shown
    assert "tau       2.500" in shown
    assert "3.0 tokens/s with the draft, 2.0 without: ratio 1.50" in shown
    report = json.loads((tmp_path / "report.json").read_text())
    assert report["tau"] == 2.5
    assert report["accepted_per_position"] == [0.75, 0.5, 0.25]
    assert "made_by" in report
    assert "not measured yet" in (pair[1] / "v1" / "README.md").read_text()  # nobody asked for it


def test_an_output_is_not_overwritten_unasked_and_can_be_written_before_the_engines_start(
    pair: tuple[Path, Path], monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    asked = engines(monkeypatch, RESULT, RESULT)
    precious = tmp_path / "costs.json"
    precious.write_text("precious")
    assert call(*pair, "--output", precious) == 2
    assert "costs.json exists. Name another file, or pass --overwrite" in " ".join(capsys.readouterr().err.split())
    assert call(*pair, "--output", tmp_path) == 2 and call(*pair, "--output", precious / "report.json") == 2
    assert call(*pair, "--overwrite") == 2
    assert precious.read_text() == "precious" and not asked
    assert call(*pair, "--output", precious, "--overwrite") == 0
    assert call(*pair, "--output", tmp_path / "new" / "report.json") == 0
    assert json.loads((tmp_path / "new" / "report.json").read_text())["tau"] == 2.5


def test_a_run_is_not_its_export(pair: tuple[Path, Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "run" / "last").mkdir(parents=True)
    (tmp_path / "run" / "train_options.json").write_text("{}")
    assert call(pair[0], tmp_path / "run") == 2
    said = " ".join(capsys.readouterr().err.split())
    assert "is a training run; expected its export" in said and "has not saved a checkpoint" not in said


def test_the_speed_to_beat_is_the_one_that_would_be_served(
    pair: tuple[Path, Path], monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    """Where only the draft needs transformers' class, which is slower: outputs are compared with that one's."""
    asked: list[EngineRequest] = []
    rounded = dataclasses.replace(RESULT, outputs=[[5, 6, 7, 9], [9, 10]], seconds=1.5)  # of another class
    results = [RESULT, dataclasses.replace(RESULT, seconds=3.0), rounded]

    def answer(request: EngineRequest) -> EngineResult:
        asked.append(request)
        return results[len(asked) - 1]

    monkeypatch.setattr(verify_vllm, "installed_vllm", lambda: "0.32.0")
    monkeypatch.setattr(verify_vllm, "serving_of", lambda config, family: Serving("transformers"))
    monkeypatch.setattr(verify_vllm, "run_engine", answer)
    assert call(*pair, "--output", tmp_path / "report.json") == 0
    assert [(one.draft is None, one.model_impl) for one in asked] == [
        (False, "transformers"), (True, "transformers"), (True, "auto"),
    ]  # fmt: skip
    shown = capsys.readouterr().out
    assert "identical with and without the draft" in shown
    assert "3.0 tokens/s with the draft, 4.0 without (by vLLM's own class of the base model, " in shown
    assert "where the draft needs --model-impl transformers): ratio 0.75" in shown
    report = json.loads((tmp_path / "report.json").read_text())
    assert report["identical"] is True and report["speed_ratio"] == 0.75
    assert (report["model_impl"], report["model_impl_without"]) == ("transformers", "auto")
    asked.clear()
    assert call(*pair, "--no_baseline") == 0 and len(asked) == 1
    assert "3.0 tokens/s with the draft\n" in capsys.readouterr().out


def test_without_the_other_engine_nothing_is_compared(
    pair: tuple[Path, Path], monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    asked = engines(monkeypatch, RESULT, RESULT)
    assert call(*pair, "--no_baseline", "--output", tmp_path / "report.json") == 0
    assert [request.draft is None for request in asked] == [False]
    shown = capsys.readouterr().out
    assert "output    not compared with the base model's own" in shown
    assert "3.0 tokens/s with the draft\n" in shown and "identical" not in shown
    report = json.loads((tmp_path / "report.json").read_text())
    names = ("identical", "differing_prompts", "first_difference", "tokens_per_second_without", "speed_ratio")
    assert {report[name] for name in names} == {None}
    assert report["tau"] == 2.5 and report["tokens_per_second"] == 3.0


@pytest.mark.parametrize("inside", ["", "plain", "speculators"])
def test_an_eagle3_draft_is_recognised_in_every_form(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, inside: str
) -> None:
    oracle = write_oracle(tmp_path, Shape())
    folder = tmp_path / "export"
    export(oracle.target, oracle.draft, folder, "both")
    asked = engines(monkeypatch, RESULT, RESULT)
    assert call(oracle.target, folder / inside, "--write-note") == 0
    served = folder / (inside or "plain")
    assert [(request.method, request.draft) for request in asked] == [("eagle3", str(served)), ("eagle3", None)]
    assert "Acceptance in vLLM: τ 2.50" in (served / "README.md").read_text(encoding="utf-8")


def test_both_engines_run_without_graphs_where_asked_to(
    pair: tuple[Path, Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    asked = engines(monkeypatch, RESULT, RESULT)
    assert call(*pair, "--enforce-eager") == 0
    assert [request.enforce_eager for request in asked] == [True, True]


def test_prompts_are_rendered_as_they_were_for_the_draft(
    pair: tuple[Path, Path], monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    template = tmp_path / "t.jinja"
    template.write_text("{% for m in messages %}{{ m.content }}{% endfor %}{{ 'b' if quiet else 'a' }}")
    asked, report = engines(monkeypatch, RESULT, RESULT), tmp_path / "report.json"
    variables = ["--chat_template_kwargs", '{"quiet": true}', "--output", report]
    assert call(*pair, "--chat_template", template) == call(*pair, "--chat_template", template, *variables) == 0
    plain, told = asked[0].prompts, asked[2].prompts
    assert [ids[:-1] for ids in plain] == [ids[:-1] for ids in told] and plain != told
    assert 'note: the chat template is told {"quiet": true}' in capsys.readouterr().out
    assert json.loads(report.read_text())["chat_template_kwargs"] == {"quiet": True}
    assert call(*pair, *variables) == 2 and len(asked) == 4
    assert "--chat_template_kwargs: quiet would do nothing" in capsys.readouterr().err


@pytest.mark.parametrize(("dtype", "code"), [("float32", 1), ("bfloat16", 0)])
def test_a_difference_is_shown_and_counts_in_float32(
    pair: tuple[Path, Path],
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    tmp_path: Path,
    dtype: str,
    code: int,
) -> None:
    prompts = tmp_path / "prompts.jsonl"
    prompts.write_text('{"turns": ["a"]}\n{"question_id": 7, "category": "maths", "turns": ["b"]}\n')
    drafted = dataclasses.replace(RESULT, dtype=dtype)
    engines(monkeypatch, drafted, dataclasses.replace(drafted, outputs=[[5, 6, 7, 8], [9, 11]]))
    assert call(*pair, "--prompts", prompts) == code
    shown = capsys.readouterr()
    assert "differs in 1 of 2 replies, first in prompt 7 (maths), token 1 of the reply (from 0)" in shown.out
    assert ("rounding differs" in shown.out) is (dtype == "bfloat16")
    assert bool(shown.err) is bool(code)


def test_nothing_accepted_is_a_failure(
    pair: tuple[Path, Path], monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    nothing = dataclasses.replace(RESULT, accepted=0, accepted_per_position=[0, 0, 0])
    engines(monkeypatch, nothing, RESULT)
    assert call(*pair, "--write-note") == 1
    assert "None of 12 drafted tokens was accepted" in capsys.readouterr().err
    assert "not measured yet" in (pair[1] / "v1" / "README.md").read_text()


def test_an_engine_that_does_not_start_is_reported(
    pair: tuple[Path, Path], monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    engines(monkeypatch, RESULT, RESULT)

    def fail(request: EngineRequest) -> EngineResult:
        raise EngineError("vLLM did not run. Its last words:\n  ValueError: why")

    monkeypatch.setattr(verify_vllm, "run_engine", fail)
    assert call(*pair, "--output", tmp_path / "report.json") == 1
    assert "ValueError: why" in capsys.readouterr().err
    report = json.loads((tmp_path / "report.json").read_text())
    assert report["loaded"] is False
    assert "ValueError: why" in report["reason"]


def test_the_note_gets_the_measurement_when_asked(pair: tuple[Path, Path], monkeypatch: pytest.MonkeyPatch) -> None:
    engines(monkeypatch, RESULT, RESULT)
    note = pair[1] / "v1" / "README.md"
    before = note.read_text(encoding="utf-8")
    assert call(*pair, "--write-note") == 0
    measured = note.read_text(encoding="utf-8")
    assert (
        "Acceptance in vLLM: τ 2.50 with 3 speculative tokens, greedy; accepted by position 0.75, 0.50, 0.25"
        in measured
    )
    note.write_text(before, encoding="utf-8")


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--num_speculative_tokens", 0], "--num_speculative_tokens 0"),
        (["--max_new_tokens", -1], "--max_new_tokens -1"),
        (["--dtype", "int8"], "--dtype int8"),
        (["--max_new_tokens", 2000], "base model has 1024"),
        (["--trained-path", "run"], "--trained_path is about the store of the training"),
        (["--tmpdir", "store", "--num_conversations", 0], "--num_conversations 0"),
        (["--tmpdir", "store", "--val_ratio", 1], "--val_ratio 1.0"),
        (["--tmpdir", "no such store"], "no such store: no such folder"),
    ],
)
def test_wrong_numbers_are_refused(
    pair: tuple[Path, Path],
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    arguments: list[object],
    message: str,
) -> None:
    assert engines(monkeypatch, RESULT, RESULT) == []
    assert call(*pair, *arguments) == 2
    assert message in " ".join(capsys.readouterr().err.split())


def test_folders_that_are_no_export_are_refused(pair: tuple[Path, Path], tmp_path: Path) -> None:
    with pytest.raises(RequestError, match=r"no config\.json"):
        verify_vllm.resolve_export(tmp_path)
    with pytest.raises(RequestError, match="layout v0"):
        verify_vllm.resolve_export(pair[1] / "v0")


def test_prompts_are_in_the_template_and_ready_for_the_reply(pair: tuple[Path, Path]) -> None:
    encoder = load_encoder(pair[0], load_config(pair[0]))
    text = encoder.tokenizer.decode(encode_first_turn(Prompt("1", "", ("hello", "never asked")), encoder))
    assert "USER: hello ASSISTANT:" in text
    assert "never asked" not in text


def test_differences_where_one_reply_is_longer() -> None:
    found = vllm_report.differences([[1, 2, 3], [4]], [[1, 2], [4]])
    assert found == [vllm_report.Difference(0, 2, [3], [])]


def test_an_engine_is_a_child_whose_end_is_told(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """Without a vLLM the child dies at its import; the parent says so and lives."""
    stub = tmp_path / "vllm.py"
    stub.write_text("raise ImportError('libcuda.so.1 is missing')\n")
    monkeypatch.setenv("PYTHONPATH", str(tmp_path))
    with pytest.raises(EngineError, match=r"exit code 1.*\n.*libcuda\.so\.1 is missing"):
        vllm_engine.run_engine(EngineRequest("base", [[1]], "draft"))


def test_last_words_are_the_cause_and_the_end() -> None:
    log = """\
(EngineCore pid=1) WARNING 11-24 10:38:44 [base.py:380] ValueError: only a warning
(EngineCore pid=1) ERROR 11-24 10:38:45 [core.py:9] Traceback (most recent call last):
(EngineCore pid=1) ERROR 11-24 10:38:45 [core.py:9]   File "x.py", line 3, in load
(EngineCore pid=1) ERROR 11-24 10:38:45 [core.py:9] ValueError: There is no module named 'lm_head'
Traceback (most recent call last):
  File "y.py", line 4, in <module>
RuntimeError: Engine core initialization failed. See root cause above.
"""
    assert last_words(log).splitlines() == [
        "  ValueError: There is no module named 'lm_head'",
        "  RuntimeError: Engine core initialization failed. See root cause above.",
    ]
    assert last_words("Killed\n") == "  Killed"
    assert last_words("") == "  (none)"
    assert len(last_words("ValueError: " + "x" * 10_000)) < 300


def test_counters_are_read_by_name_and_summed_over_engines() -> None:
    @dataclasses.dataclass
    class Counter:
        name: str
        value: int

    @dataclasses.dataclass
    class Vector:
        name: str
        values: list[int]

    class Engine:
        def get_metrics(self) -> list[object]:
            prefix = "vllm:spec_decode_num_"
            engines = [Counter(f"{prefix}drafts", 3), Counter(f"{prefix}drafts", 4), Counter("vllm:other", 9)]
            return [*engines, Vector(f"{prefix}accepted_tokens_per_pos", [2, 1])]

    assert read_counters(Engine()) == {"drafts": 7, "accepted_tokens_per_pos.0": 2, "accepted_tokens_per_pos.1": 1}
