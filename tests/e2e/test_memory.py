"""``--dry_run``: the plan against what training really takes, and that it needs and leaves nothing."""

from __future__ import annotations

import json
import re
import shutil
from pathlib import Path

import pytest

from eagle.train import main as training
from tests.e2e.commands import ROOT, ask, command
from tests.random_run import planned_and_measured, write_random_store, write_random_target

pytestmark = pytest.mark.skipif(not Path("/proc/self/status").exists(), reason="memory is measured through /proc")

#: By name: the base model, batch, length, and what else is asked for.
SHAPES: dict[str, tuple[dict[str, int], int, int, list[object]]] = {
    "wide, untied": ({"vocab": 32000, "hidden": 1024, "inner": 2816, "heads": 16, "kv_heads": 16}, 2, 512, []),
    "large vocabulary, tied, grouped queries": (
        {"vocab": 49152, "hidden": 576, "inner": 1536, "heads": 9, "kv_heads": 3, "tied": True}, 4, 512, [],
    ),
    "EAGLE-3, seven steps": (
        {"vocab": 32000, "hidden": 512, "inner": 1408, "heads": 8, "kv_heads": 4, "layers": 3}, 2, 256,
        ["--draft", "eagle3", "--ttt_steps", 7, "--draft_vocab_size", 8000],
    ),
}  # fmt: skip


@pytest.mark.parametrize(
    "name", [pytest.param(name, marks=[pytest.mark.long] if name == "wide, untied" else []) for name in SHAPES]
)
def test_the_plan_is_what_training_takes(name: str, tmp_path: Path) -> None:
    shape, bs, length, more = SHAPES[name]
    target = write_random_target(tmp_path / "target", **shape)
    aux = tuple(range(shape.get("layers", 0)))
    store = write_random_store(
        tmp_path / "store", vocab=shape["vocab"], hidden=shape["hidden"], records=3 * bs, length=length, aux_layers=aux
    )
    options = [
        *more,
        "--tmpdir",
        store,
        "--basepath",
        target,
        "--cpdir",
        tmp_path / "run",
        "--bs",
        bs,
        "--max_len",
        length,
    ]
    found = planned_and_measured(lambda *words: command(*words).out, *options, "--num_epochs", 1, "--max_steps", 2)
    assert found["planned"] == pytest.approx(found["measured"], rel=0.15), found
    # The runtime is measured, not planned: without it the rest has to be right too.
    own = {key: found[key] - found["runtime"] for key in ("planned", "measured")}
    assert own["planned"] == pytest.approx(own["measured"], rel=0.2), found


@pytest.mark.parametrize("name", ["llama_2_chat_7B", "llama_2_chat_70B", "qwen2_7B", "qwen2_72B"])
def test_a_config_is_enough(name: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    config = ROOT / "configs" / f"{name}_config.json"
    answer = ask(training.main, capsys, "--dry_run", "--configpath", config, "--bs", 1)
    assert answer.code == 0
    folder = tmp_path / "target"
    folder.mkdir()
    shutil.copy(config, folder / "config.json")
    by_folder = ask(training.main, capsys, "--dry_run", "--basepath", folder, "--cpdir", tmp_path / "run", "--bs", 1)
    assert table(by_folder.out) == table(answer.out)
    assert "peak" in answer.out
    assert re.search(r"closed-form start: about .* \(sums .* s, solution .* s\)", answer.out)
    answer = ask(training.main, capsys, "--dry_run", "--configpath", config, "--bs", 1, "--init", "random")
    assert "start" not in answer.out
    assert not (tmp_path / "run").exists()


def test_a_config_is_enough_for_eagle3(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """A draft's, which does not say how many layers the base model has, or the base model's own."""
    config = ROOT / "configs" / "qwen2_7B_config.json"
    words = ["--dry_run", "--draft", "eagle3", "--bs", 1]
    answer = ask(training.main, capsys, *words, "--configpath", config)
    assert answer.code == 0 and "gradient of the draft's head" in answer.out, answer.err
    folder = tmp_path / "target"
    folder.mkdir()
    base = json.loads(config.read_text()) | {"num_hidden_layers": 28}
    (folder / "config.json").write_text(json.dumps(base))
    for given in (["--configpath", folder / "config.json"], ["--basepath", folder]):
        assert table(ask(training.main, capsys, *words, *given).out) == table(answer.out)
    fewer = ask(training.main, capsys, *words, "--basepath", folder, "--aux_layers", "3,20")
    assert largest(fewer.out, "batch") < largest(answer.out, "batch")
    refused = ask(training.main, capsys, *words, "--basepath", folder, "--aux_layers", "3,28")
    assert refused.code == 2 and "there is no 28" in refused.error


def largest(text: str, name: str) -> float:
    return max(float(size) for size in re.findall(rf"^  {name} +([\d.]+)$", text.replace(",", ""), re.MULTILINE))


def table(text: str) -> list[str]:
    """The plan without the runtime, which is measured, and what it adds to."""
    return [line for line in text.splitlines() if line.startswith("  ") and "runtime" not in line]


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ([], "--basepath or --configpath"),
        (["--basepath", "nowhere"], "nowhere"),
        (["--configpath", "nowhere.json"], "nowhere.json"),
        (["--configpath", ROOT / "configs/qwen2_7B_config.json", "--bs", 0], "--bs 0"),
    ],
)
def test_what_cannot_be_planned_is_refused(options, message, capsys) -> None:
    answer = ask(training.main, capsys, "--dry_run", *options)
    assert answer.code == 2
    assert message in answer.error


@pytest.mark.parametrize("more", [["--draft", "eagle1"], ["--draft", "eagle3"]])
def test_the_store_may_still_be_missing(more: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """As with the command that is to be typed behind step 3."""
    words = ["--dry_run", *more, "--configpath", ROOT / "configs" / "qwen2_7B_config.json", "--init", "random"]
    answer = ask(training.main, capsys, *words, "--tmpdir", tmp_path / "features")
    assert answer.code == 0, answer.err
    assert f"note: --tmpdir {tmp_path / 'features'} is not there yet" in answer.out
    assert table(answer.out) == table(ask(training.main, capsys, *words).out)
    (tmp_path / "features").write_text("a file")
    assert ask(training.main, capsys, *words, "--tmpdir", tmp_path / "features").code == 2


def test_a_store_of_another_model_is_refused(store: Path, capsys: pytest.CaptureFixture[str]) -> None:
    config = ROOT / "configs" / "qwen2_7B_config.json"
    answer = ask(training.main, capsys, "--dry_run", "--configpath", config, "--tmpdir", store)
    assert answer.code == 2
    assert "different models" in answer.error


def test_without_a_dry_run_the_folders_are_required(capsys: pytest.CaptureFixture[str]) -> None:
    answer = ask(training.main, capsys, "--configpath", ROOT / "configs" / "qwen2_7B_config.json")
    assert answer.code == 2
    assert "--cpdir" in answer.err and "--basepath" in answer.err
