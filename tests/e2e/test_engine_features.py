"""Training without a store, with an engine beside it: the draft of transformers' features, whatever dies meanwhile.

The engine is one of ours in vLLM's place (`tests.stub_engine`); vLLM's own: `tests.vllm.test_trained_features`.
"""

from __future__ import annotations

import contextlib
import os
import time
from pathlib import Path

import pytest
import torch

from eagle.train import main as train
from eagle.train.checkpoint import states
from tests.e2e.commands import ask, inside
from tests.e2e.killed import train_and_die
from tests.e2e.ranks import start_ranks
from tests.e2e.test_training import TOLERANCE, steps_of, weights
from tests.stub_engine import stub_python

#: Seconds that an engine may take to end behind whoever started it.
PATIENCE = 30


@pytest.fixture(scope="module")
def words(llama: Path, data: Path) -> list[object]:
    common = ["--basepath", llama, "--data_path", data, "--dtype", "float32", "--num_epochs", 2]
    return [*common, "--save_every", 3, "--max_steps", 8, "--val_ratio", 0.1]


@pytest.fixture(scope="module")
def theirs(words: list[object], tmp_path_factory: pytest.TempPathFactory) -> Path:
    """With transformers."""
    cpdir = tmp_path_factory.mktemp("theirs") / "run"
    inside("-m", "eagle.train.main", *words, "--cpdir", cpdir)
    return cpdir


def engine(folder: Path, fault: str = "") -> list[object]:
    return ["--feature_source", "vllm", "--engine_python", stub_python(folder, fault)]


def folders() -> set[Path]:
    """All but those that other processes hold: other tests run at the same time."""
    locks = [line.split() for line in Path("/proc/locks").read_text().splitlines()]
    held = {int(lock[5].split(":")[2]) for lock in locks if lock[1] == "FLOCK" and int(lock[4]) != os.getpid()}
    found = set()
    for folder in Path("/dev/shm").glob("eagle-states-*"):
        with contextlib.suppress(FileNotFoundError):  # it was just taken away
            if folder.stat().st_ino not in held:
                found.add(folder)
    return found


def running(target: Path) -> list[int]:
    """The engines of that target."""
    found = []
    for entry in Path("/proc").glob("[0-9]*/cmdline"):
        try:
            said = entry.read_bytes()
        except OSError:  # it has just ended
            continue
        if b"eagle.generate.engine_server" in said and str(target).encode() in said:
            found.append(int(entry.parent.name))
    return found


def assert_same_run(ours: Path, theirs: Path) -> None:
    for line, expected in zip(steps_of(ours), steps_of(theirs), strict=True):
        assert line["step"] == expected["step"]
        assert line.get("loss") == pytest.approx(expected.get("loss"), abs=1e-4)
        assert line.get("val_tau") == pytest.approx(expected.get("val_tau"), abs=1e-4)
    for name, tensor in weights(theirs).items():
        torch.testing.assert_close(weights(ours)[name], tensor, **TOLERANCE, msg=name)


def test_an_engine_that_is_killed(words: list[object], theirs: Path, llama: Path, tmp_path: Path, capsys) -> None:
    """Its death ends training; the same command goes on, and comes to what transformers' features come to."""
    before, cpdir = folders(), tmp_path / "run"
    run = [*words, "--cpdir", cpdir]
    # The start reads 36 records one by one, the first validation one batch.
    answer = ask(train.main, capsys, *run, *engine(tmp_path, "killed 43"))
    assert answer.code == 1
    assert "The engine that computes the features was killed by SIGKILL (out of memory?)" in answer.error
    assert str(cpdir / "engine.log") in answer.error
    assert [path.name for path in states(cpdir)] == ["state_0", "state_3"]
    answer = ask(train.main, capsys, *run)
    assert answer.code == 2 and "feature_source was 'vllm', now None" in answer.error
    answer = inside("-m", "eagle.train.main", *run, *engine(tmp_path))
    assert "resuming from" in answer.out and "features from vLLM 0.32.0" in answer.out
    assert_same_run(cpdir, theirs)
    assert not running(llama) and folders() <= before


def test_training_that_is_killed(words: list[object], llama: Path, tmp_path: Path) -> None:
    """Its engine ends, and takes its folder away."""
    before = folders()
    train_and_die([*words, "--cpdir", tmp_path / "run", *engine(tmp_path)], "step", 2)
    deadline = time.monotonic() + PATIENCE
    while running(llama) or not folders() <= before:
        assert time.monotonic() < deadline, (running(llama), folders() - before)
        time.sleep(0.05)


def test_processes_of_a_machine_share_one(words: list[object], theirs: Path, llama: Path, tmp_path: Path) -> None:
    """And all of them end as it does."""
    before, cpdir = folders(), tmp_path / "run"
    run = [*words, "--cpdir", cpdir, "--bs", 2, *engine(tmp_path, "raises 55")]
    ranks = start_ranks(tmp_path, [run, run], one_machine=True)
    assert [rank.wait() for rank in ranks] == [1, 1]
    assert "the stub was told to fail" in ranks[0].said, [rank.said for rank in ranks]
    assert [path.name for path in cpdir.glob("engine*.log")] == ["engine.log"]
    ours, expected = steps_of(cpdir), steps_of(theirs)
    assert 1 < len(ours) < len(expected)
    for line, other in zip(ours, expected, strict=False):
        assert line.get("loss") == pytest.approx(other.get("loss"), abs=1e-4)
    assert not running(llama) and folders() <= before


@pytest.mark.parametrize(
    ("wrong", "says"),
    [
        (["--engine_args", '{"a": 1}'], '--engine_args {"a": 1} would do nothing'),
        (["--feature_source", "vllm", "--engine_args", "a"], "is no JSON object"),
        (["--feature_source", "vllm", "--engine_args", '{"seed": 1}'], "seed is decided by the job"),
        (["--feature_source", "vllm", "--tensor_parallel_size", 0], "--tensor_parallel_size 0"),
        (["--feature_source", "vllm", "--engine_cards", "0,1", "--tensor_parallel_size", 4], "take 4 cards"),
        (["--feature_source", "vllm", "--engine_cards", "0"], "this is a CPU"),
        (["--feature_source", "vllm", "--engine_python", "nowhere"], "--engine_python nowhere cannot be run"),
    ],
)
def test_wrong_requests(words: list[object], wrong: list, says: str, tmp_path: Path, capsys) -> None:
    for dry in ([], ["--dry_run"]):
        answer = ask(train.main, capsys, *words, "--cpdir", tmp_path / "run", *wrong, *dry)
        assert answer.code == 2
        assert says in answer.error
    assert not (tmp_path / "run").exists()


def test_an_engine_is_for_data_path(llama: Path, tmp_path: Path, capsys) -> None:
    stored = ["--tmpdir", tmp_path, "--basepath", llama, "--cpdir", tmp_path / "run"]
    answer = ask(train.main, capsys, *stored, *engine(tmp_path))
    assert answer.code == 2 and "--feature_source vllm would do nothing: it is for --data_path" in answer.error


def test_a_dry_run_looks_at_the_engine(words: list[object], tmp_path: Path, capsys) -> None:
    answer = ask(train.main, capsys, *words, *engine(tmp_path), "--dry_run")
    assert answer.code == 0 and "features from vLLM 0.32.0" in answer.out and "base model, for" not in answer.out
