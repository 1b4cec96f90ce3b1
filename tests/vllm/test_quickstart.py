"""The draft that the quickstart trained, in vLLM. Skipped where the quickstart has not run."""

from __future__ import annotations

import json
import os
from pathlib import Path

import pytest

from eagle.vllm import verify as verify_vllm
from tests.vllm.engines import ROOT

QUICKSTART = Path(os.environ.get("EAGLE_QUICKSTART", ROOT / "quickstart"))
MODEL, DRAFT = QUICKSTART / "model", QUICKSTART / "draft-vllm" / "v1"

pytestmark = pytest.mark.skipif(
    not (DRAFT / "config.json").is_file(), reason=f"the quickstart has not run: no {DRAFT}/config.json"
)


def verify(folder: Path, dtype: str, prompts: int) -> dict:
    report = folder / f"{dtype}.json"
    arguments = ["--base-path", MODEL, "--draft-path", DRAFT, "--num_prompts", prompts, "--max_new_tokens", 64]
    arguments += ["--dtype", dtype, "--output", report]
    assert verify_vllm.main([str(argument) for argument in arguments]) == 0
    return json.loads(report.read_text())


def test_the_output_is_the_targets_own_and_every_position_is_accepted(tmp_path: Path) -> None:
    report = verify(tmp_path, "float32", 6)
    print(f"\nquickstart, float32: tau {report['tau']:.3f}, by position {report['accepted_per_position']}")
    assert report["identical"]
    assert len(report["accepted_per_position"]) == 3
    assert all(rate > 0 for rate in report["accepted_per_position"])


@pytest.mark.long
def test_the_models_own_dtype_is_accepted_as_well(tmp_path: Path) -> None:
    """Rounding in bfloat16 may change the output when several tokens are verified at once: only τ is looked at."""
    report = verify(tmp_path, "bfloat16", 3)
    print(f"\nquickstart, bfloat16: tau {report['tau']:.3f}, identical: {report['identical']}")
    assert report["tau"] > 1
