"""A disk that fills up: what was finished stays, the message says so, and with room the same command goes on."""

from __future__ import annotations

import os
import shutil
import signal
import subprocess
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from eagle.data.loss_mask import load_encoder
from eagle.drafts.saved import load_draft, resolve_pointer, save_draft
from eagle.target.config import load_config
from eagle.train.checkpoint import states
from tests.e2e.commands import command, inside, start
from tests.e2e.conftest import WORKERS, contents, draft_of
from tests.e2e.test_interrupted_generation import wait_until, workers_of
from tests.serving import FakeServer

Resize = Callable[[str], None]


@pytest.fixture
def disk(tmp_path: Path) -> Iterator[tuple[Path, Resize]]:
    """A small disk of its own, and a way to make it larger. Only root may mount one."""
    path = tmp_path / "disk"
    path.mkdir()

    def mount(options: str) -> bool:
        words = ["mount", "-t", "tmpfs", "-o", options, "tmpfs", str(path)]
        try:
            return subprocess.run(words, capture_output=True, check=False).returncode == 0
        except FileNotFoundError:
            return False

    def resize(size: str) -> None:
        assert mount(f"remount,size={size}")

    if not mount("size=64k"):
        pytest.skip("mounting a small disk takes root on Linux")
    try:
        yield path, resize
    finally:
        subprocess.run(["umount", "-l", str(path)], check=True)


def check_message(err: str, *says: str) -> None:
    assert "Traceback" not in err
    said = " ".join(err.split())
    for text in ("No space left on device", *says):
        assert text in said


def test_generation(disk: tuple[Path, Resize], job: list[object], undisturbed: Path) -> None:
    path, resize = disk
    resize("64m")
    process = start(*job, "--outdir", path / "store")
    # The plan has been checked when the workers start; they are held before they write, and the disk is filled.
    wait_until(lambda: len(workers_of(path / "store")) == WORKERS, process)
    for worker in workers_of(path / "store"):
        os.kill(worker, signal.SIGSTOP)
    needed = sum(file.stat().st_size for file in undisturbed.rglob("shard-*.safetensors"))
    others = path / "somebody else's file"
    others.write_bytes(bytes(shutil.disk_usage(path).free - needed // 2))
    for worker in workers_of(path / "store"):
        os.kill(worker, signal.SIGCONT)
    _, err = process.communicate(timeout=60)
    assert process.returncode == 1
    check_message(err, "Could not write", "make room and run the same command again")
    assert set(contents(path / "store")) < set(contents(undisturbed))
    assert not list((path / "store").rglob("*.tmp")), "half a file would keep the disk full"
    others.unlink()
    inside(*job, "--outdir", path / "store")
    assert contents(path / "store") == contents(undisturbed)


def test_regenerating(disk: tuple[Path, Resize], qwen: Path, data: Path, tmp_path: Path) -> None:
    """The journal fills the disk: what came before is kept, and asked for once."""
    path, resize = disk
    resize("24k")
    words = ["tools/regenerate.py", "--model_name", qwen, "--data_path", data, "--concurrency", 1]
    with FakeServer(load_encoder(qwen, load_config(qwen))) as server:
        command(*words, "--server", server.url, "--output", tmp_path / "whole.jsonl")
        server.asked.clear()
        answer = command(*words, "--server", server.url, "--output", path / "own.jsonl", code=1)
        check_message(answer.err, "own.jsonl.journal could not be written", "run the same command again")
        assert not (path / "own.jsonl").exists() and server.asked
        resize("8m")
        command(*words, "--server", server.url, "--output", path / "own.jsonl")
        assert sorted(server.asked.values())[-2:] in ([1, 1], [1, 2])  # the one that did not fit, at most
    assert (path / "own.jsonl").read_bytes() == (tmp_path / "whole.jsonl").read_bytes()


def test_generation_that_would_not_fit_does_not_begin(disk: tuple[Path, Resize], job: list[object]) -> None:
    path, resize = disk
    resize("4m")
    answer = inside(*job, "--outdir", path / "store", code=1)
    said = answer.error
    assert "but its disk has" in said and "Nothing was computed" in said and "--store_dtype int8 needs" in said
    assert not list(path.rglob("shard-*"))


def test_resharding(disk: tuple[Path, Resize], undisturbed: Path) -> None:
    path, resize = disk
    resize("6m")
    words = ["reassign_data_num.py", "--old_folder", undisturbed, "--new_folder", path / "new", "--tp", 3]
    answer = inside(*words, code=1)
    check_message(answer.err)
    resize("64m")
    inside(*words)
    assert contents(path / "new") == contents(undisturbed)


def test_training(disk: tuple[Path, Resize], store: Path, llama: Path) -> None:
    path, resize = disk
    resize("500k")  # the start, and one checkpoint with an optimizer behind it
    words = ["-m", "eagle.train.main", "--tmpdir", store, "--basepath", llama, "--cpdir", path / "run"]
    words += ["--num_epochs", 5, "--keep", 5]
    answer = inside(*words, code=1)
    check_message(answer.err, "Could not save", "The checkpoints before it are whole", "run the same command again")
    before = states(path / "run")
    assert before
    assert resolve_pointer(path / "run" / "last") == before[-1]
    for state in before:
        load_draft(state)
    assert not list((path / "run").glob(".*.tmp"))
    resize("8m")
    assert f"resuming from {before[-1]}" in inside(*words).out
    assert len(states(path / "run")) == 5
    load_draft(path / "run" / "last")


def test_exporting(disk: tuple[Path, Resize], llama: Path, tmp_path: Path) -> None:
    path, resize = disk
    save_draft(draft_of(llama), tmp_path / "draft")
    words = ["convert_eagle_ckpt_to_vllm_compatible.py", "--base-path", llama, "--draft-path", tmp_path / "draft"]
    words += ["--output-path", path / "out", "--layout", "v0"]
    check_message(inside(*words, code=1).err)
    assert not list(path.iterdir())
    resize("8m")
    inside(*words)
