"""Drafts of features that vLLM computed: without a store they are those of transformers' features, and they serve."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from eagle.drafts.saved import LAST, resolve_pointer
from eagle.train.run_log import METRICS
from eagle.vllm import verify
from tests.e2e.commands import ask, inside
from tests.e2e.test_training import steps_of
from tests.taught import teach_target
from tests.tiny import CORPUS, conversations, write_sharegpt
from tests.vllm.engines import IN_PROCESS
from tests.vllm.extracted import distance

#: Of a tensor's largest value after some steps. A layer's output begins at zeros, and AdamW divides by the gradient's
#: size, so there the noise of float32 is as large as this.
SAME = 1e-2
#: Tokens that a draft proposes.
K = 2


@pytest.fixture(scope="module")
def taught(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("trained")
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    teach_target(root / "base")
    write_sharegpt(root / "data.json", conversations(48))
    torch.set_num_threads(threads)
    return root


def train(root: Path, cpdir: Path, *more: object) -> Path:
    words = ["--basepath", root / "base", "--cpdir", cpdir, "--max_len", 256, "--noise", 0, *more]
    inside("-m", "eagle.train.main", *words)
    return cpdir


def test_without_a_store(taught: Path, tmp_path: Path) -> None:
    words = ["--data_path", taught / "data.json", "--end_num", 24, "--dtype", "float32", "--num_epochs", 2]
    ours = train(taught, tmp_path / "ours", *words, "--feature_source", "vllm")
    theirs = train(taught, tmp_path / "theirs", *words)
    for line, expected in zip(steps_of(ours), steps_of(theirs), strict=True):
        assert line["step"] == expected["step"]
        assert line.get("loss") == pytest.approx(expected.get("loss"), abs=1e-5)
        assert line.get("val_tau") == pytest.approx(expected.get("val_tau"), abs=1e-5)
    own, other = (load_file(resolve_pointer(run / LAST) / "model.safetensors") for run in (ours, theirs))
    assert own.keys() == other.keys()
    far = {name: distance(own[name], other[name]) for name in other}
    print(f"\nof the largest value of a weight: {far}")
    assert max(far.values()) < SAME


@pytest.fixture(scope="module")
def store(taught: Path) -> Path:
    """For either kind of draft."""
    inside(
        "allocation.py", "--outdir", taught / "store", "--model_name", taught / "base",
        "--data_path", taught / "data.json", "--dtype", "float32", "--draft", "eagle3", "--max_length", 256,
        "--feature_source", "vllm",
    )  # fmt: skip
    assert json.loads((taught / "store" / "manifest.json").read_text())["engine"]["vllm"]
    return taught / "store"


@pytest.mark.parametrize("draft", [pytest.param("eagle1", marks=pytest.mark.long), "eagle3"])
def test_a_draft_of_them_serves(
    draft: str, store: Path, taught: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch
) -> None:
    """And far more is accepted than of an untrained draft."""
    kind = ["--tmpdir", store, "--draft", draft, "--init", "random", "--lr", 3e-3]
    trained = train(taught, tmp_path / "trained", *kind, "--num_epochs", 4)
    untrained = json.loads((trained / METRICS).read_text(encoding="utf-8").splitlines()[0])
    base = ["--base-path", taught / "base", "--draft-path"]
    inside("convert_eagle_ckpt_to_vllm_compatible.py", *base, trained, "--output-path", tmp_path / "export")
    folder = next((tmp_path / "export").rglob("config.json")).parent
    prompts, report = tmp_path / "prompts.txt", tmp_path / "report.json"
    prompts.write_text("".join(line + "\n" for line in CORPUS if "\n" not in line and line.isascii()))
    for name, value in IN_PROCESS.items():
        monkeypatch.setenv(name, value)
    answer = ask(
        verify.main, capsys, *base, folder, "--prompts", prompts, "--max_new_tokens", 32,
        "--num_speculative_tokens", K, "--dtype", "float32", "--output", report,
    )  # fmt: skip
    assert answer.code == 0, answer.error
    found = json.loads(report.read_text(encoding="utf-8"))
    print(f"\n{draft}: tau {found['tau']:.3f}, untrained {untrained['val_tau'][K - 1]:.3f}")
    assert untrained["step"] == 0 and found["identical"]
    assert found["tau"] > untrained["val_tau"][K - 1] + 0.3
