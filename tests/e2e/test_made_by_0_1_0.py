"""What version 0.1.0 wrote, in tests/data/made_by_0_1_0, is read and continued: stores, checkpoints.

target, conversations.json    a tiny Llama and its data
store, store_verified.json    the features of all conversations, and what `verify` said of them
store_int8                    the same in one byte a value; killed before its second worker began
run, undisturbed_metrics.jsonl    training killed at step 16, and what the run came to that was not
"""

from __future__ import annotations

import dataclasses
import json
import shutil
from pathlib import Path

import pytest

from eagle.drafts.saved import load_draft, resolve_pointer
from eagle.store.verify import check_store
from tests.e2e.commands import ROOT, command, inside

MADE = ROOT / "tests" / "data" / "made_by_0_1_0"


@pytest.fixture
def made(tmp_path: Path) -> Path:
    """A copy; its manifests name the target where it was."""
    return Path(shutil.copytree(MADE, tmp_path / "made", symlinks=True))


def test_a_store_is_read_to_the_bit() -> None:
    expected = json.loads((MADE / "store_verified.json").read_text())
    found = dataclasses.asdict(check_store(MADE / "store"))
    assert {name: found[name] for name in expected} == expected
    assert not found["damage"] and found["complete"]


@pytest.mark.parametrize("indices", ["0,1", "0"], ids=["same workers", "others"])
def test_an_interrupted_store_is_continued(made: Path, indices: str) -> None:
    first = (made / "store_int8" / "0" / "shard-00000.safetensors").read_bytes()
    command(
        "allocation.py", "--model_name", made / "target", "--data_path", made / "conversations.json",
        "--npu_indices", indices, "--dtype", "float32", "--outdir", made / "store_int8", "--store_dtype", "int8",
    )  # fmt: skip
    summary, whole = check_store(made / "store_int8"), json.loads((MADE / "store_verified.json").read_text())
    assert summary.complete and not summary.damage
    assert (summary.records, summary.token_digest) == (whole["records"], whole["token_digest"])
    assert (made / "store_int8" / "0" / "shard-00000.safetensors").read_bytes() == first, "what was done is kept"


def test_a_killed_run_is_resumed_and_ends_as_it_would_have(made: Path) -> None:
    run = made / "run"
    load_draft(run / "state_14")
    answer = inside(
        "-m", "eagle.train.main", "--tmpdir", made / "store", "--basepath", made / "target", "--cpdir", run,
        "--bs", 4, "--num_epochs", 3, "--save_every", 14,
    )  # fmt: skip
    assert "state_14 (step 14 of 36)" in answer.out
    found, expected = (lines(path) for path in (run / "metrics.jsonl", MADE / "undisturbed_metrics.jsonl"))
    assert [line["step"] for line in found] == [line["step"] for line in expected]
    for ours, theirs in zip(found, expected, strict=True):
        for name, value in theirs.items():
            if not name.endswith("seconds"):
                assert ours[name] == pytest.approx(value, abs=2e-3), (name, ours["step"])
    assert resolve_pointer(run / "best").name == "state_24"


def test_a_checkpoint_is_exported(made: Path) -> None:
    inside(
        "convert_eagle_ckpt_to_vllm_compatible.py", "--base-path", made / "target",
        "--draft-path", made / "run" / "state_14", "--output-path", made / "exported", "--layout", "both",
    )  # fmt: skip
    assert (made / "exported" / "v1" / "model.safetensors").is_file()


def lines(path: Path) -> list[dict]:
    return [json.loads(line) for line in path.read_text().splitlines()]
