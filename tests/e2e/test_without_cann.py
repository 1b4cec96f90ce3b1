"""A machine with torch_npu whose shell did not source CANN's set_env.sh: work that names no device is a CPU's."""

from __future__ import annotations

from pathlib import Path

import accelerate

from eagle.releases import TORCH
from eagle.versions import release
from tests.cards import install_torch_npu
from tests.e2e.commands import Answer, command

WHY = "libhccl.so: cannot open shared object file"


def test_a_launcher_ends_and_says_why(tmp_path: Path) -> None:
    """It imports torch, and torch_npu, before it comes to the toolkit: the guide says so."""
    environment = install_torch_npu(tmp_path, f"raise ImportError({WHY!r})")
    launch = ["accelerate launch", "-m", "eagle.train.main", "--help"]
    answer = command(*launch, code=1, **environment)
    assert WHY in answer.error and "eagle" not in answer.out
    autoload = ["Failed to load the backend extension: torch_npu"] if TORCH >= (2, 5) else []
    assert all(words in answer.error for words in autoload), answer.error
    environment["TORCH_DEVICE_BACKEND_AUTOLOAD"] = "0"
    if release(accelerate.__version__) >= (1, 15):
        assert "usage: eagle.train.main" in command(*launch, **environment).out
    else:
        assert WHY in command(*launch, code=1, **environment).error


def test_steps_3_and_4_and_an_evaluation(llama: Path, data: Path, tmp_path: Path) -> None:
    environment = install_torch_npu(tmp_path, f"raise ImportError({WHY!r})")
    note = f"note: torch_npu is installed and cannot be used: {WHY}. In this shell run 'source "

    def run(*words: object) -> Answer:
        answer = command(*words, **environment)
        assert answer.error.count(note) == 1, answer.error
        return answer

    store, draft = tmp_path / "store", tmp_path / "draft"
    asked = ["allocation.py", "--model_name", llama, "--data_path", data, "--end_num", 8, "--dtype", "float32"]
    assert "1 worker(s) on cpu" in run(*asked, "--outdir", store).out
    run("-m", "eagle.train.main", "--tmpdir", store, "--cpdir", draft, "--basepath", llama, "--max_steps", 1)
    run("-m", "eagle.evaluate", "--base-path", llama, "--draft-path", draft, "--num_prompts", 1, "--max_new_tokens", 4)
    refused = command(*asked, "--outdir", tmp_path / "other", "--device", "npu", code=2, **environment)
    assert f"error: --device npu: torch_npu is installed and cannot be used: {WHY}." in refused.error
