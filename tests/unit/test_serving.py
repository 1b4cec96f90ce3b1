"""What vLLM has to be told to serve a target with a draft is in the export's note and in what verify asks for."""

from __future__ import annotations

import dataclasses
import json
import shlex
from collections.abc import Mapping
from pathlib import Path

import pytest

from eagle.drafts.families import DRAFT_FAMILIES
from eagle.errors import RequestError
from eagle.target.config import load_config, parse_config
from eagle.target.families import TARGET_FAMILIES
from eagle.vllm.export import export
from eagle.vllm.serving import Serving, serving_of
from tests.families import make_row, row_named
from tests.oracle import Shape
from tests.oracle3 import Oracle, write_oracle
from tests.unit.exports import make_draft
from tests.unit.test_verify_vllm import RESULT, call, engines

EAGLE1, EAGLE3 = DRAFT_FAMILIES["eagle1"], DRAFT_FAMILIES["eagle3"]
LONG = {
    "rope_type": "longrope", "rope_theta": 1e4, "original_max_position_embeddings": 4096,
    "short_factor": [1.0] * 16, "long_factor": [2.0] * 16,
}  # fmt: skip


@pytest.fixture(scope="module")
def oracle(tmp_path_factory: pytest.TempPathFactory) -> Oracle:
    return write_oracle(tmp_path_factory.mktemp("oracle"), Shape())


@pytest.fixture(scope="module")
def granite(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    root = tmp_path_factory.mktemp("granite")
    base = make_row(root / "base", row_named("granite"))
    return base, make_draft(root / "draft", base)


def served(patch: pytest.MonkeyPatch, serves: Mapping[str, str]) -> None:
    """As if that were how vLLM serves Llama targets."""
    patch.setitem(TARGET_FAMILIES, "llama", dataclasses.replace(TARGET_FAMILIES["llama"], serves=serves))


@pytest.mark.parametrize("family", TARGET_FAMILIES)
def test_every_family_is_served_as_its_entry_says(family: str, oracle: Oracle) -> None:
    target = dataclasses.replace(load_config(oracle.target), family=family)
    for draft in DRAFT_FAMILIES.values():
        found = serving_of(target, draft)
        assert (found.model_impl, found.least_context) == (TARGET_FAMILIES[family].serves[draft.method], 0)
    warned = " ".join(serving_of(target, DRAFT_FAMILIES["eagle1"]).reasons())
    assert ("No `--model-impl transformers`" in warned) == (family == "gemma3_text")


def test_a_draft_that_no_vllm_serves_is_refused_before_anything_is_written(
    oracle: Oracle, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    folder = export(oracle.target, oracle.draft, tmp_path / "served", "plain")["plain"]
    served(monkeypatch, {"eagle": "auto"})
    with pytest.raises(RequestError, match=r"vLLM does not serve an EAGLE-3 draft with Llama .* --draft eagle1"):
        export(oracle.target, oracle.draft, tmp_path / "export", "plain")
    assert not (tmp_path / "export").exists()
    asked = engines(monkeypatch, RESULT, RESULT)
    assert call(oracle.target, folder) == 2
    assert "vLLM does not serve" in capsys.readouterr().err and asked == []


@pytest.mark.parametrize("layout", EAGLE3.layouts)
def test_transformers_code_is_asked_for_where_it_is_needed(
    oracle: Oracle, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], layout: str
) -> None:
    flag = "--model-impl transformers"
    plain = export(oracle.target, oracle.draft, tmp_path / "plain", layout)[layout]
    assert (
        "model-impl" not in (plain / "README.md").read_text() and "model_impl" not in (plain / "README.md").read_text()
    )
    served(monkeypatch, {"eagle": "auto", "eagle3": "transformers"})
    folder = export(oracle.target, oracle.draft, tmp_path / "export", layout)[layout]
    note = (folder / "README.md").read_text()
    commands = [line for line in note.replace("\\\n", " ").splitlines() if "vllm serve" in line]
    assert len(commands) == (2 if layout == "speculators" else 1) and all(flag in line for line in commands)
    assert shlex.split(commands[0])[2:5] == [str(oracle.target.resolve()), *flag.split()]
    assert 'model_impl="transformers",\n' in note
    assert "does not hand over what the draft reads" in note
    asked = engines(monkeypatch, RESULT, RESULT)
    assert call(oracle.target, folder) == 0
    assert [request.model_impl for request in asked] == ["transformers", "transformers", "auto"]
    assert flag in capsys.readouterr().out


def test_a_target_with_longrope_is_served_with_its_long_factors(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    raw = json.loads((make_row(tmp_path / "base", row_named("qwen2")) / "config.json").read_text())
    raw |= {"rope_parameters": LONG, "rope_theta": 1e4, "rope_scaling": None}
    for longest, least in ((131072, 4097), (4096, 0)):
        config = parse_config(raw | {"max_position_embeddings": longest})
        assert serving_of(config, EAGLE1) == Serving(least_context=least)
    assert Serving(least_context=4097).flags() == ""
    base = tmp_path / "base"
    (base / "config.json").write_text(json.dumps(raw | {"max_position_embeddings": 131072}))
    folder = export(base, make_draft(tmp_path / "draft", base), tmp_path / "export", "v1")["v1"]
    assert "No `--max-model-len` below 4097" in (folder / "README.md").read_text()
    asked = engines(monkeypatch, RESULT, RESULT)
    assert call(base, folder) == 0
    assert [request.max_model_len() for request in asked] == [4097, 4097]


def test_the_old_layout_is_for_the_targets_it_was_run_with(
    granite: tuple[Path, Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    base, draft = granite
    assert export(base, draft, tmp_path / "both", "both") == {"v1": tmp_path / "both"}
    assert "not written, v0: it was only run with base models of model_type llama and qwen2" in capsys.readouterr().out
    with pytest.raises(RequestError, match=r"--layout v0: v0: it was .* and this one is granite.* Use --layout v1"):
        export(base, draft, tmp_path / "old", "v0")
    assert not (tmp_path / "old").exists()
