"""docs/targets.md and its Chinese twin say what ran: every row with a result, and every family with a row."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

from eagle.drafts.families import DRAFT_FAMILIES
from eagle.target.families import TARGET_FAMILIES
from tests.families import ROWS
from tools.write_targets import DOCS, PAGES, RESULTS, render, stale, write

FOUND = json.loads((DOCS / RESULTS).read_text(encoding="utf-8"))


def test_the_pages_are_what_is_rendered() -> None:
    assert stale(DOCS) == []


def test_every_family_has_a_row_that_ran_and_every_row_a_family() -> None:
    assert {row.family for row in ROWS} == TARGET_FAMILIES.keys()
    assert list(FOUND["rows"]) == [row.name for row in ROWS]
    for row in ROWS:
        found = FOUND["rows"][row.name]
        assert (found["family"], found["models"], found["shape"]) == (row.family, row.models, dict(row.shape))
        assert found["own_decoding"]["accepted"] > 0


def test_what_is_listed_as_served_is_what_the_families_say_and_what_ran_right() -> None:
    allowed = FOUND["tolerances"]
    for row in ROWS:
        drafts = FOUND["rows"][row.name]["drafts"]
        assert {method: found["model_impl"] for method, found in drafts.items()} == dict(
            TARGET_FAMILIES[row.family].serves
        )
        for found in drafts.values():
            assert 0 <= found["parity"] < allowed["parity"] and 0 <= found["features"] < allowed["features"]


def test_the_gate_runs_the_families_that_people_serve_most() -> None:
    gate = {row.family for row in ROWS if row.gate}
    assert gate >= {"llama", "qwen2", "qwen3", "qwen3_moe", "mistral", "phi3", "gemma3_text"}


def test_a_page_says_what_cannot_be_served_and_is_stale_when_a_result_changes(tmp_path: Path) -> None:
    name, *_ = FOUND["rows"]
    method = next(iter(DRAFT_FAMILIES.values())).method
    changed = json.loads(json.dumps(FOUND))
    changed["rows"][name]["drafts"].pop(method)
    for page in PAGES:
        text, before = render(page, changed), render(page, FOUND)
        differing = [line for line in text.splitlines() if line not in before.splitlines()]
        assert len(differing) == 1 and page.not_served in differing[0]
    for file in (RESULTS, *(page.file for page in PAGES)):
        shutil.copyfile(DOCS / file, tmp_path / file)
    assert stale(tmp_path) == []
    (tmp_path / RESULTS).write_text(json.dumps(changed))
    assert len(stale(tmp_path)) == len(PAGES)
    write(tmp_path)
    assert stale(tmp_path) == []
