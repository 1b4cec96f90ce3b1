"""The command for users: on an oracle pair, and on a draft that vLLM does not load."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest

from eagle.entry import run
from eagle.vllm import verify as verify_vllm
from eagle.vllm.export import export
from tests.oracle import Shape, write_pair
from tests.oracle3 import write_oracle
from tests.vllm.damage import edit_config
from tests.vllm.planted import data_file, make_store, write_templates


@pytest.fixture(scope="module")
def pair(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    root = tmp_path_factory.mktemp("verify")
    target, draft = write_pair(root, Shape("qwen2", kv_heads=2))
    return target, export(target, draft, root / "export", "v1")["v1"]


def test_an_oracle_pair(pair: tuple[Path, Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    base, draft = pair
    report = tmp_path / "report.json"
    data, template = data_file(tmp_path), write_templates(tmp_path)["plain"]
    store = make_store(tmp_path / "store", base, data, template, "eagle1")
    arguments = ["--num_prompts", "3", "--max_new_tokens", "32", "--num_speculative_tokens", "2", "--dtype", "float32"]
    arguments += ["--output", str(report), "--write-note", "--chat_template", str(template)]
    arguments += ["--tmpdir", str(store), "--trained-path", str(draft), "--val_ratio", "0.3"]
    code = run(lambda: verify_vllm.main(["--base-path", str(base), "--draft-path", str(draft), *arguments]))
    shown = capsys.readouterr()
    print("\n" + shown.out)
    assert code == 0, shown.err
    assert "identical with and without the draft" in shown.out
    found = json.loads(report.read_text())
    assert found["loaded"] and found["identical"]
    assert len(found["accepted_per_position"]) == 2
    assert found["tau"] > 2
    assert found["made_by"]["argv"]
    gate = found["gate"]
    assert gate["is_sound"] and gate["conversations"] == 7 and not gate["causes"]
    assert gate["engine"] == gate["predicted"]
    assert "the engine accepts what training makes expect" in shown.out
    assert f"Acceptance in vLLM: τ {found['tau']:.2f}" in (draft / "README.md").read_text()


@pytest.mark.long
def test_an_eagle3_oracle_in_the_speculators_form(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """The other form is looked at in `tests.vllm.test_trained_eagle3`."""
    oracle = write_oracle(tmp_path, Shape(kv_heads=2))
    draft = export(oracle.target, oracle.draft, tmp_path / "export", "speculators")["speculators"]
    arguments = ["--num_prompts", "3", "--max_new_tokens", "32", "--num_speculative_tokens", "1", "--dtype", "float32"]
    arguments += ["--base-path", str(oracle.target), "--draft-path", str(draft), "--write-note"]
    code = run(lambda: verify_vllm.main(arguments))
    shown = capsys.readouterr()
    print("\n" + shown.out)
    assert code == 0, shown.err
    assert "identical with and without the draft" in shown.out
    assert "Acceptance in vLLM: τ 1." in (draft / "README.md").read_text(encoding="utf-8")


def test_a_draft_that_does_not_load(
    pair: tuple[Path, Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    base, draft = pair
    broken = Path(shutil.copytree(draft, tmp_path / "broken"))
    edit_config(broken, lambda config: config.update(architectures=["NoSuchForCausalLM"]))
    code = run(lambda: verify_vllm.main(["--base-path", str(base), "--draft-path", str(broken), "--num_prompts", "1"]))
    shown = capsys.readouterr()
    print("\n" + shown.err)
    assert code == 1
    assert f"vLLM did not run with the draft {broken}" in shown.err
    assert "NoSuchForCausalLM" in shown.err
    assert len(shown.err.splitlines()) < 12
