"""Resharding killed before every single change it makes, and at random: no record is lost or doubled."""

from __future__ import annotations

import json
import os
import random
import shutil
import time
from collections import Counter
from itertools import count
from pathlib import Path

import pytest
import torch

from eagle.errors import RequestError
from eagle.files import locked
from eagle.store import reshard as reassign_data_num
from eagle.store.reader import FeatureStore
from eagle.store.record import Record
from eagle.store.shard import write_shard
from tests.e2e import killed
from tests.e2e.commands import ask

HIDDEN = 8


def record(conversation: int, generator: torch.Generator) -> Record:
    length = int(torch.randint(4, 40, (1,), generator=generator))
    return Record(
        conversation,
        torch.randint(100, (length,), generator=generator).int(),
        torch.ones(length, dtype=torch.uint8),
        torch.randn(length, HIDDEN, generator=generator),
    )


def make_store(folder: Path, workers: int, shards: int, records: int) -> Path:
    """A finished store as data generation leaves it."""
    generator, numbers = torch.Generator().manual_seed(0), count()
    for worker in range(workers):
        own = folder / str(worker)
        own.mkdir(parents=True)
        for shard in range(shards):
            write_shard(
                own / f"shard-{shard:05d}.safetensors", [record(next(numbers), generator) for _ in range(records)]
            )
        (own / "done.json").write_text(json.dumps({"records": shards * records, "dropped": {}, "repaired": {}}))
        (own / "worker.log").touch()
    manifest = {"format_version": 1, "target": {"name": "t", "fingerprint": "f"}, "data": {"digest": "d"}}
    (folder / "manifest.json").write_text(json.dumps({**manifest, "dropped": {"null_value": 3}, "complete": True}))
    return folder


def contents(folder: Path) -> Counter[tuple[int, int]]:
    return Counter((found.conversation, found.crc32()) for found in FeatureStore(folder))


def check_resharded(folder: Path, parts: int, expected: Counter[tuple[int, int]]) -> None:
    assert contents(folder) == expected
    assert sum((contents(folder / str(part)) for part in range(parts)), Counter()) == expected
    left = {path.name for path in folder.iterdir()} - {".lock"}
    assert left == {"manifest.json", *map(str, range(parts))}, "nothing of the old layout or of the work stays"
    assert json.loads((folder / "manifest.json").read_text())["dropped"] == {"null_value": 3}


@pytest.mark.parametrize("in_place", [False, True], ids=["new folder", "in place"])
def test_killed_before_every_change(
    in_place: bool, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(os, "fsync", lambda descriptor: None)
    original = make_store(tmp_path / "original", workers=3, shards=2, records=4)
    expected = contents(original)
    moments = random.Random(0)
    for moment in count(1):
        old = shutil.copytree(original, tmp_path / f"old{moment}")
        new = old if in_place else tmp_path / f"new{moment}"
        words = ["--old_folder", old, "--new_folder", new, "--tp", 2]
        process = killed.reshard(words, moment)
        process.join()
        if process.exitcode == 0:
            break
        assert process.exitcode == killed.KILLED
        if not in_place:
            assert contents(old) == expected
        if new.is_dir():
            try:  # whoever reads the folder now sees everything, or is told
                assert contents(new) == expected
            except RequestError as error:
                assert "interrupted" in str(error) or "no finished records" in str(error)
        killed.reshard(words, moments.randrange(1, 12)).join()  # killed again while it tidies up
        answer = ask(reassign_data_num.main, capsys, *words)
        assert answer.code == 0, answer
        assert answer.out.count(" records, ") == 2
        check_resharded(new, 2, expected)
        shutil.rmtree(old)
        shutil.rmtree(new, ignore_errors=True)
    assert moment > 25, "so many changes does it make at least"
    check_resharded(new, 2, expected)


def wait_for_lock(folder: Path) -> None:
    while not (folder / ".lock").exists():
        time.sleep(0.001)


def test_killed_at_random_in_place(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Real kills, one after another on the same store, while it is resharded back and forth."""
    folder = make_store(tmp_path / "store", workers=4, shards=20, records=5)
    expected = contents(folder)
    moments, interrupted = random.Random(1), 0
    # A run that is left alone says how long this machine takes, so that the kills fall into it.
    process = killed.reshard(["--old_folder", folder, "--new_folder", folder, "--tp", 4])
    wait_for_lock(folder)
    started = time.monotonic()
    process.join()
    duration = time.monotonic() - started
    for parts in [2, 3, 5] * 4:
        (folder / ".lock").unlink(missing_ok=True)
        process = killed.reshard(["--old_folder", folder, "--new_folder", folder, "--tp", parts])
        wait_for_lock(folder)
        time.sleep(moments.uniform(0, duration / 2))
        process.kill()
        process.join()
        interrupted += process.exitcode != 0
    assert interrupted > 3, "most kills came too late to matter"
    answer = ask(reassign_data_num.main, capsys, "--old_folder", folder, "--new_folder", folder, "--tp", 2)
    assert answer.code == 0, answer
    check_resharded(folder, 2, expected)


def test_two_at_once_in_one_folder_are_refused(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    folder = make_store(tmp_path / "store", workers=2, shards=2, records=4)
    before = contents(folder)
    with locked(folder, "--outdir"):
        answer = ask(reassign_data_num.main, capsys, "--old_folder", folder, "--new_folder", folder, "--tp", 3)
    assert answer.code == 2
    assert "is in use by another running job" in answer.error
    assert contents(folder) == before


def test_classic_dumps_of_several_workers_become_a_store(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Every worker of the public scripts numbers its dumps from 0."""
    generator, dumps = torch.Generator().manual_seed(0), []
    for worker in range(2):
        (tmp_path / "old" / str(worker)).mkdir(parents=True)
        for number in range(5):
            made = record(number, generator)
            dumps.append(made)
            torch.save(
                {"input_ids": made.input_ids, "loss_mask": made.loss_mask, "hidden_state": made.hidden_state},
                tmp_path / "old" / str(worker) / f"data_{number}.ckpt",
            )
    for new in ("new", "old"):  # the second time in place
        words = ["--old_folder", tmp_path / "old", "--new_folder", tmp_path / new, "--tp", 3]
        assert ask(reassign_data_num.main, capsys, *words).code == 0
        assert contents(tmp_path / new) == Counter((made.conversation, made.crc32()) for made in dumps)
    assert not list((tmp_path / "old").rglob("*.ckpt"))
