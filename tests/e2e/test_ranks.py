"""Ranks that see different things, cannot begin, or end in the middle: all end, and say why. Nothing hangs.

And a run goes on with another number of processes.
"""

from __future__ import annotations

import json
import os
import shutil
import signal
import socket
import time
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from eagle.drafts.saved import resolve_pointer
from eagle.store.reader import FeatureStore
from eagle.store.shard import write_shard
from eagle.train.checkpoint import states
from tests.e2e.ranks import FSDP, start_ranks

HOST = socket.gethostname()

#: Two processes sum a global batch in another order than one: float32 rounding, of which AdamW, which divides by the
#: gradient's size, makes more in the two epochs. Relative to the largest value of a tensor.
TOLERANCE = 1e-5


@pytest.fixture(scope="module")
def shards(store: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The store of all conversations in two shards."""
    folder = tmp_path_factory.mktemp("shards") / "store"
    folder.mkdir()
    records = list(FeatureStore(store))
    for number, own in enumerate((records[:30], records[30:])):
        write_shard(folder / f"shard-{number:05d}.safetensors", own)
    return folder


def options(store: Path, target: Path, cpdir: Path, *more: object) -> list[object]:
    return [
        "--tmpdir", store, "--basepath", target, "--cpdir", cpdir, "--num_epochs", 2, "--init", "random",
        "--val_ratio", 0, *more,
    ]  # fmt: skip


def test_fsdp_on_one_machine_only(store: Path, llama: Path, tmp_path: Path) -> None:
    """Where another configuration of accelerate, or none, was given. Their collectives would not meet."""
    ranks = start_ranks(tmp_path, [options(store, llama, tmp_path / "run")] * 2, of_rank={1: FSDP})
    assert [rank.wait() for rank in ranks] == [2, 2]
    for rank in ranks:
        assert "in the device: sharing is FSDP there and none on rank 0" in rank.said


def test_a_shard_that_one_rank_does_not_see(shards: Path, llama: Path, tmp_path: Path) -> None:
    """A store on the machines' own disks, or one that is still being written."""
    local = shutil.copytree(shards, tmp_path / "local")
    (local / "shard-00001.safetensors").unlink()
    ranks = start_ranks(tmp_path, [options(where, llama, tmp_path / "run") for where in (shards, shards, local)])
    assert [rank.wait() for rank in ranks] == [2, 2, 2]
    for rank in ranks:
        assert f"error: rank 2 (host {HOST}) differs from rank 0 (host {HOST}) in the records: " in rank.said
        assert "records is 30 there and 40 on rank 0; tokens is" in rank.said
        assert "--tmpdir (or --data_path) has to hold the same on every machine" in rank.said
    assert not (tmp_path / "run").exists()


def test_as_many_records_of_other_conversations(shards: Path, llama: Path, tmp_path: Path) -> None:
    elsewhere = tmp_path / "other"
    elsewhere.mkdir()
    first, second, *rest = FeatureStore(shards)
    assert len(first) != len(second)
    swapped = [replace(one, conversation=other.conversation) for one, other in ((second, first), (first, second))]
    write_shard(elsewhere / "shard-00000.safetensors", [*swapped, *rest])
    ranks = start_ranks(tmp_path, [options(where, llama, tmp_path / "run") for where in (shards, elsewhere)])
    assert [rank.wait() for rank in ranks] == [2, 2]
    assert "in the records: lengths and conversations is sha256" in ranks[0].said


def test_a_folder_for_checkpoints_on_every_machine(shards: Path, llama: Path, tmp_path: Path) -> None:
    """Rank 0 has written some, when the run is to go on."""
    both = [options(shards, llama, tmp_path / where / "run", "--max_steps", 2) for where in ("a", "b")]
    (first,) = start_ranks(tmp_path / "before", [[*both[0], "--bs", 8]])
    assert first.wait() == 0
    ranks = start_ranks(tmp_path, both)
    assert [rank.wait() for rank in ranks] == [2, 2]
    for rank in ranks:
        assert "rank 1" in rank.said and "in the checkpoint: newest is none there and state_2 (epoch " in rank.said
        assert "--cpdir has to be one folder that all machines share" in rank.said


def test_other_options_on_one_rank(shards: Path, llama: Path, tmp_path: Path) -> None:
    run = options(shards, llama, tmp_path / "run")
    ranks = start_ranks(tmp_path, [run, [*run, "--lr", 0.01]])
    assert [rank.wait() for rank in ranks] == [2, 2]
    for rank in ranks:
        assert "in the command: --lr is 0.01 there and not given on rank 0." in rank.said
        assert "Start every process with the same command." in rank.said


@pytest.mark.parametrize(
    ("wrong", "says"),
    [
        (["--tmpdir", "missing"], "ended: --tmpdir missing: no such file or folder; expected a folder."),
        (["--bs", 0], "ended: --bs 0: expected 1 or more."),
        (["--bs", "four"], "ended: its own output says why."),
    ],
    ids=["folder", "value", "command line"],
)
def test_a_rank_that_cannot_begin(wrong: list[object], says: str, shards: Path, llama: Path, tmp_path: Path) -> None:
    run = options(shards, llama, tmp_path / "run")
    ranks = start_ranks(tmp_path, [run, [*run, *wrong]])
    assert [rank.wait() for rank in ranks] == [2, 2]
    assert f"error: rank 1 (host {HOST}) {says}" in ranks[0].said
    assert not (tmp_path / "run").exists()


def test_a_rank_that_never_comes(shards: Path, llama: Path, tmp_path: Path) -> None:
    (rank,) = start_ranks(tmp_path, [options(shards, llama, tmp_path / "run")], missing=1)
    assert rank.wait() == 1
    assert "RANK=0 WORLD_SIZE=2 MASTER_ADDR=127.0.0.1" in rank.said
    assert "has met no group of 2 in 2 seconds. Start the others" in rank.said


@pytest.mark.parametrize("lost", [0, 1])
def test_a_rank_that_is_killed(lost: int, shards: Path, llama: Path, tmp_path: Path) -> None:
    """Rank 0's store goes with it; a collective tells the others that somebody is gone, the beats who it is."""
    run = options(shards, llama, tmp_path / "run")
    ranks = start_ranks(tmp_path, [run, run], dies={lost: 3})
    assert ranks[lost].wait() == -signal.SIGKILL
    killed = time.monotonic()
    assert ranks[1 - lost].wait() == 1
    assert time.monotonic() - killed < 60
    assert f"error: rank {lost} (host {HOST}) was killed or lost" in ranks[1 - lost].said
    assert "the same command goes on from the last one" in ranks[1 - lost].said


def test_a_rank_that_stands_still(shards: Path, llama: Path, tmp_path: Path) -> None:
    """Its connections stay open, as those of a machine that is down: the others wait in a collective and miss it.

    Should it wake up again, it does not wait for them either.
    """
    run = options(shards, llama, tmp_path / "run")
    ranks = start_ranks(tmp_path, [run, run], dies={1: 3}, by=signal.SIGSTOP, tick=0.1)
    assert ranks[0].wait() == 1
    assert f"error: rank 1 (host {HOST}) was killed or lost: nothing is heard of it" in ranks[0].said
    os.kill(ranks[1].process.pid or 0, signal.SIGCONT)
    assert ranks[1].wait() == 1
    assert f"error: rank 0 (host {HOST}) was killed or lost" in ranks[1].said


@pytest.mark.parametrize(("number", "code"), [(signal.SIGINT, 130), (signal.SIGTERM, 143)])
def test_a_rank_that_is_ended_by_hand(number: int, code: int, shards: Path, llama: Path, tmp_path: Path) -> None:
    run = options(shards, llama, tmp_path / "run")
    ranks = start_ranks(tmp_path, [run, run], dies={1: 3}, by=number)
    assert [rank.wait() for rank in ranks] == [1, code]
    reason = "interrupted" if number == signal.SIGINT else "SIGTERM ended it"
    assert f"error: rank 1 (host {HOST}) ended: {reason}" in ranks[0].said


def test_the_last_words_of_a_rank(shards: Path, llama: Path, tmp_path: Path) -> None:
    """Its copy of the store is damaged where nobody looks before the record's turn."""
    damaged = shutil.copytree(shards, tmp_path / "damaged")
    for path in damaged.iterdir():
        content = bytearray(path.read_bytes())
        header = 8 + int.from_bytes(content[:8], "little")
        first, end = json.loads(content[8:header])["hidden_state"]["data_offsets"]
        for at in range(header + first, header + end, 64):
            content[at] ^= 1
        path.write_bytes(content)
    run = [options(where, llama, tmp_path / "run") for where in (shards, damaged)]
    ranks = start_ranks(tmp_path, run)
    assert [rank.wait() for rank in ranks] == [1, 1]
    words = ranks[1].said.partition("error: ")[2]
    assert "damaged" in words and str(damaged) in words
    assert f"error: rank 1 (host {HOST}) ended: {words}" in ranks[0].said


@pytest.fixture(scope="module")
def undisturbed(shards: Path, llama: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("undisturbed")
    (rank,) = start_ranks(folder, [elastic(shards, llama, folder / "run", 4, 1)])
    assert rank.wait() == 0
    return folder / "run"


def elastic(store: Path, target: Path, cpdir: Path, bs: int, accumulation: int) -> list[object]:
    return [
        *options(store, target, cpdir), "--bs", bs, "--gradient_accumulation_steps", accumulation,
        "--save_every", 3, "--val_ratio", 0.1,
    ]  # fmt: skip


@pytest.fixture(scope="module")
def killed(shards: Path, llama: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Two processes; killed a step behind a checkpoint within the second epoch."""
    folder = tmp_path_factory.mktemp("killed")
    run = elastic(shards, llama, folder / "run", 2, 1)
    for rank in start_ranks(folder, [run, run], dies={0: 13}, tick=0.1):
        assert rank.wait()
    assert states(folder / "run")[-1].name == "state_12"
    return folder / "run"


@pytest.mark.parametrize(
    ("processes", "bs", "accumulation"), [(1, 4, 1), (1, 2, 2), (4, 1, 1)], ids=["bs", "accumulation", "processes"]
)
def test_going_on_with_other_processes(
    processes: int, bs: int, accumulation: int, killed: Path, undisturbed: Path, shards: Path, llama: Path,
    tmp_path: Path,
) -> None:  # fmt: skip
    cpdir = shutil.copytree(killed, tmp_path / "run", symlinks=True)
    ranks = start_ranks(tmp_path, [elastic(shards, llama, cpdir, bs, accumulation)] * processes)
    assert [rank.wait() for rank in ranks] == [0] * processes
    assert "state_12 (step 12 of " in ranks[0].out
    ours, theirs = (steps_of(run) for run in (cpdir, undisturbed))
    assert [line["step"] for line in ours] == [line["step"] for line in theirs]
    for line, expected in zip(ours, theirs, strict=True):
        assert line.get("supervised_tokens") == expected.get("supervised_tokens")
        assert line.keys() == expected.keys()
        for key in {"loss", "val_token_loss", "lr"} & line.keys():
            assert line[key] == pytest.approx(expected[key], rel=1e-4), (key, line["step"])
    found, expected = (load_file(resolve_pointer(run / "last") / "model.safetensors") for run in (cpdir, undisturbed))
    for name, tensor in expected.items():
        difference = ((found[name] - tensor).abs().max() / tensor.abs().max()).item()
        assert difference < TOLERANCE, (name, difference)
    assert not torch.equal(expected["fc.weight"], load_file(cpdir / "state_12" / "model.safetensors")["fc.weight"])


def test_another_global_batch_is_refused(killed: Path, shards: Path, llama: Path, tmp_path: Path) -> None:
    (rank,) = start_ranks(tmp_path, [elastic(shards, llama, killed, 2, 1)])
    assert rank.wait() == 2
    assert "the global batch was 4 sequences (2 processes x --bs 2 x --gradient_accumulation_steps 1)" in rank.said
    assert "now 2 sequences (1 processes x --bs 2 x --gradient_accumulation_steps 1)" in rank.said
    assert "with 1 processes --bs 2 --gradient_accumulation_steps 2 makes that" in rank.said


def steps_of(cpdir: Path) -> list[dict]:
    return [json.loads(line) for line in (cpdir / "metrics.jsonl").read_text().splitlines()]
