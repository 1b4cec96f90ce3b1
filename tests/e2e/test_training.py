"""Training runs against each other: however a global batch is dealt out, and wherever a run was killed."""

from __future__ import annotations

import json
import re
import signal
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from eagle.draft import load_draft
from eagle.features import FeatureStore
from eagle.train.checkpoint import resolve_pointer, states
from tests.e2e.commands import command

#: Sums over a global batch in another order differ in the last bits of float32; three epochs of AdamW, which divides by
#: the gradient's size, make more of them. Runs that only share the seed differ by 0.1 and more.
TOLERANCE = {"rtol": 0.0, "atol": 1e-4}

#: Runs training and kills the process, without warning, at the moment its first argument names.
KILLER = """
import os, signal, sys
from eagle.train import checkpoint, loop, main

where, count = sys.argv[1], int(sys.argv[2])
def die(*_):
    os.kill(os.getpid(), signal.SIGKILL)

if where == "step":
    step = loop.Trainer._step
    loop.Trainer._step = lambda self, *rest: die() if self.position.step == count else step(self, *rest)
elif where == "saving":
    write_json = checkpoint.write_json
    checkpoint.write_json = lambda path, content: die() if content.get("step") == count else write_json(path, content)
elif where == "pointing":
    point = checkpoint.point
    checkpoint.point = lambda folder, pointer, name: die() if name == f"state_{count}" else point(folder, pointer, name)
main.main(sys.argv[3:])
"""


def options(store: Path, target: Path, cpdir: Path, *more: object) -> list[object]:
    return ["--tmpdir", store, "--basepath", target, "--cpdir", cpdir, "--num_epochs", 3, *more]


def weights(cpdir: Path) -> dict[str, torch.Tensor]:
    return load_file(resolve_pointer(cpdir / "last") / "model.safetensors")


def steps_of(cpdir: Path) -> list[dict]:
    lines = [json.loads(line) for line in (cpdir / "metrics.jsonl").read_text().splitlines()]
    return [{key: value for key, value in line.items() if not key.endswith("seconds")} for line in lines]


@pytest.fixture(scope="module")
def undisturbed(tmp_path_factory: pytest.TempPathFactory, store: Path, llama: Path) -> Path:
    """One process, four sequences a step, no mixed precision."""
    cpdir = tmp_path_factory.mktemp("training") / "undisturbed"
    command("-m", "eagle.train.main", *options(store, llama, cpdir, "--bs", 4))
    return cpdir


@pytest.mark.parametrize(
    "launch",
    [
        ["torchrun", "--standalone", "--nproc_per_node", 2, "-m", "eagle.train.main", "--bs", 2],
        ["-m", "eagle.train.main", "--bs", 2, "--gradient_accumulation_steps", 2],
    ],
    ids=["two processes", "gradient accumulation"],
)
def test_a_global_batch_may_be_dealt_out_in_any_way(
    launch: list[object], undisturbed: Path, store: Path, llama: Path, tmp_path: Path
) -> None:
    command(*launch, *options(store, llama, tmp_path / "run"))
    ours, theirs = steps_of(tmp_path / "run"), steps_of(undisturbed)
    assert [line["step"] for line in ours] == [line["step"] for line in theirs]
    for line, expected in zip(ours, theirs, strict=True):
        for key in ("loss", "feature_loss", "token_loss", "val_token_loss"):
            assert line.get(key) == pytest.approx(expected.get(key), abs=1e-4), (key, line["step"])
        assert line.get("supervised_tokens") == expected.get("supervised_tokens")
        assert line.get("val_positions") == expected.get("val_positions")
    for name, tensor in weights(undisturbed).items():
        torch.testing.assert_close(weights(tmp_path / "run")[name], tensor, **TOLERANCE, msg=name)


def test_a_killed_run_goes_on_as_if_nothing_had_happened(
    undisturbed: Path, store: Path, llama: Path, tmp_path: Path
) -> None:
    """Killed before the first checkpoint, between two, while one is written, and before it is pointed at."""
    run = options(store, llama, tmp_path / "run", "--bs", 4)
    epoch = len({line["step"] for line in steps_of(undisturbed)} - {0}) // 3
    for where, at in (("step", 3), ("step", epoch + 4), ("saving", 2 * epoch), ("pointing", 2 * epoch)):
        command("-c", KILLER, where, at, *run, code=-signal.SIGKILL)
        for state in states(tmp_path / "run"):
            load_draft(state)
    assert [state.name for state in states(tmp_path / "run")] == [f"state_{epoch}", f"state_{2 * epoch}"]
    assert "resuming from" in command("-m", "eagle.train.main", *run).out

    assert steps_of(tmp_path / "run") == steps_of(undisturbed)
    for state in states(undisturbed):
        expected = load_file(state / "model.safetensors")
        found = load_file(tmp_path / "run" / state.name / "model.safetensors")
        assert all(torch.equal(found[name], tensor) for name, tensor in expected.items())
    for pointer in ("best", "last"):
        assert resolve_pointer(tmp_path / "run" / pointer).name == resolve_pointer(undisturbed / pointer).name
    assert not list((tmp_path / "run").glob(".*.tmp"))


def test_accelerate_starts_as_many_cpu_processes_as_asked(store: Path, llama: Path, tmp_path: Path) -> None:
    run = options(store, llama, tmp_path / "run", "--num_epochs", 1)
    answer = command("accelerate launch", "--cpu", "--num_processes", 2, "-m", "eagle.train.main", *run)
    assert "on 2 x cpu" in answer.out


def test_without_validation_the_newest_checkpoint_is_the_best(store: Path, llama: Path, tmp_path: Path) -> None:
    command("-m", "eagle.train.main", *options(store, llama, tmp_path / "run", "--val_ratio", 0, "--keep", 1))
    newest = states(tmp_path / "run")
    assert len(newest) == 1
    assert resolve_pointer(tmp_path / "run" / "best") == resolve_pointer(tmp_path / "run" / "last") == newest[0]


def test_a_process_without_validation_records_waits_for_nobody(store: Path, llama: Path, tmp_path: Path) -> None:
    """One record is held out, so one of the two processes has none."""
    launch = ["torchrun", "--standalone", "--nproc_per_node", 2, "-m", "eagle.train.main"]
    answer = command(*launch, *options(store, llama, tmp_path / "run", "--val_ratio", 0.02, "--num_epochs", 1))
    assert "and 1 validation records" in answer.out
    command("-m", "eagle.train.main", *options(store, llama, tmp_path / "alone", "--val_ratio", 0.02, "--bs", 8,
            "--num_epochs", 1))  # fmt: skip
    ours, alone = (steps_of(tmp_path / name)[-1] for name in ("run", "alone"))
    assert ours["val_positions"] == alone["val_positions"]
    assert ours["val_token_loss"] == pytest.approx(alone["val_token_loss"], abs=1e-4)


def test_a_record_that_is_not_finite_ends_the_run_before_it_does_harm(store: Path, llama: Path, tmp_path: Path) -> None:
    """The store's own writer refuses it, a folder of dumps made elsewhere can hold it."""
    dumps = tmp_path / "dumps"
    dumps.mkdir()
    for number, record in enumerate(FeatureStore(store)):
        features = record.hidden_state.clone()
        if number == 11:
            features[-3] = float("nan")
        content = {"input_ids": record.input_ids, "loss_mask": record.loss_mask, "hidden_state": features}
        torch.save(content, dumps / f"data_{number}.ckpt")
    run = options(dumps, llama, tmp_path / "run", "--bs", 4, "--init", "random", "--val_ratio", 0, "--save_every", 1)
    answer = command("-m", "eagle.train.main", *run, code=1)
    assert "not finite at step" in answer.err and re.search(r"conversations [\d, ]*\b11\b", answer.err), answer.err
    for state in states(tmp_path / "run"):
        assert all(tensor.isfinite().all() for tensor in load_file(state / "model.safetensors").values())


def test_a_run_whose_loss_keeps_growing_is_ended(store: Path, llama: Path, tmp_path: Path) -> None:
    run = options(store, llama, tmp_path / "run", "--bs", 2, "--lr", 2, "--grad_clip", 0, "--val_ratio", 0)
    answer = command("-m", "eagle.train.main", *run, "--num_epochs", 10, code=1)
    assert "keeps growing" in answer.err and "lower --lr" in answer.err and "conversations" in answer.err
