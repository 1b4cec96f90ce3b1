"""Data generation that is killed, interrupted or fails: nothing survives it, nothing is lost, a rerun finishes."""

from __future__ import annotations

import contextlib
import os
import random
import shutil
import signal
import subprocess
import threading
import time
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from eagle.generate import claim
from eagle.generate import main as allocation
from eagle.releases import TORCH
from eagle.store.reader import FeatureStore
from eagle.store.shard import shard_paths
from eagle.store.verify import check_store
from tests.e2e.commands import ask, command, start
from tests.e2e.conftest import CONVERSATIONS, WORKERS, contents
from tests.tiny import make_target

pytestmark = pytest.mark.skipif(not Path("/proc/self/cmdline").exists(), reason="finds the workers through /proc")


def workers_of(outdir: Path) -> list[int]:
    """The worker processes of a job that are alive, found by their command line."""
    found = []
    for path in Path("/proc").glob("[0-9]*/cmdline"):
        try:
            words = path.read_bytes().split(b"\0")
        except OSError:  # it has just ended
            continue
        if b"eagle.generate.worker" in words and str(outdir).encode() in words:
            found.append(int(path.parent.name))
    return found


def go_on(workers: list[int]) -> None:
    """Let stopped ones go on. One that was ended before its SIGSTOP took effect is gone already."""
    for worker in workers:
        with contextlib.suppress(ProcessLookupError):
            os.kill(worker, signal.SIGCONT)


def wait_until(condition: Callable[[], object], process: subprocess.Popen[str] | None = None) -> None:
    """Raises AssertionError when it does not come about, or when `process` ends before it does."""
    for _ in range(6000):
        if condition():
            return
        assert process is None or process.poll() is None, process.communicate()
        time.sleep(0.01)
    raise AssertionError("waited in vain")


def shards(outdir: Path) -> int:
    return sum(len(shard_paths(outdir / str(worker))) for worker in range(WORKERS))


def test_a_killed_job_is_continued(job: list[object], undisturbed: Path, tmp_path: Path) -> None:
    outdir = tmp_path / "store"
    moments = random.Random(0)
    for reached in (1, 3):
        process = start(*job, "--outdir", outdir)
        wait_until(lambda reached=reached: shards(outdir) >= reached, process)
        time.sleep(moments.uniform(0, 0.1))
        process.kill()
        process.communicate()
        wait_until(lambda: not workers_of(outdir))
    found = contents(outdir)
    assert len(found) < CONVERSATIONS, "the last kill came too late to matter"
    assert set(found) <= set(contents(undisturbed))
    command(*job, "--outdir", outdir)
    assert contents(outdir) == contents(undisturbed)
    assert not list(outdir.rglob("*.tmp"))


def test_a_killed_jobs_workers_hold_its_folder_until_they_end(
    job: list[object],
    undisturbed: Path,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Else one that still waits for the disk would put a shard in place behind the back of the job that goes on."""
    outdir = tmp_path / "store"
    process = start(*job, "--outdir", outdir)
    wait_until(lambda: shards(outdir) > 0, process)
    victim = workers_of(outdir)[0]
    os.kill(victim, signal.SIGSTOP)
    try:
        process.kill()
        process.communicate()
        with monkeypatch.context() as patch:
            patch.setattr(claim, "PATIENCE", 0.2)
            refused = ask(allocation.main, capsys, *job[1:], "--outdir", outdir)
        assert refused.code == 2
        assert "is in use by another running job, or by processes that one left when it was killed" in refused.error
        threading.Timer(1, os.kill, (victim, signal.SIGCONT)).start()
        again = ask(allocation.main, capsys, *job[1:], "--outdir", outdir)
    finally:
        if victim in workers_of(outdir):
            os.kill(victim, signal.SIGKILL)
    assert again.code == 0, again.error
    assert "waiting up to 15 s for it" in again.error
    assert contents(outdir) == contents(undisturbed)


def test_a_worker_that_dies_ends_the_job(job: list[object], undisturbed: Path, tmp_path: Path) -> None:
    outdir = tmp_path / "store"
    shutil.copytree(undisturbed, outdir)
    for worker in range(WORKERS):
        for path in shard_paths(outdir / str(worker))[1:]:
            path.unlink()
        (outdir / str(worker) / "worker.log").write_text("words of an earlier run\n")
    process = start(*job, "--outdir", outdir)
    wait_until(lambda: shards(outdir) > WORKERS, process)
    victim = workers_of(outdir)[0]
    os.kill(victim, signal.SIGKILL)
    _, err = process.communicate(timeout=60)
    assert process.returncode == 1
    said = err[err.index("error: ") :]
    assert "was killed by SIGKILL (out of memory?)" in said
    assert "(it said nothing)" in said, "what an earlier run said is not what this one died of"
    assert "run the same command again to continue" in said
    assert "Traceback" not in err
    assert not workers_of(outdir)


def test_ctrl_c_ends_every_worker_and_a_second_job_is_refused(
    job: list[object], tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(claim, "PATIENCE", 0.2)
    outdir = tmp_path / "store"
    process = start(*job, "--outdir", outdir)
    wait_until(lambda: len(workers_of(outdir)) == WORKERS, process)
    workers = workers_of(outdir)
    for worker in workers:
        os.kill(worker, signal.SIGSTOP)  # so that the job is still there however fast this machine is
    second = ask(allocation.main, capsys, *job[1:], "--outdir", outdir)
    assert second.code == 2
    assert "is in use by another running job" in second.error
    process.send_signal(signal.SIGINT)
    go_on(workers)
    _, err = process.communicate(timeout=60)
    assert process.returncode == 130
    assert "interrupted" in err
    assert "Traceback" not in err
    assert not workers_of(outdir)


@pytest.mark.skipif(TORCH < (2, 2), reason="float16 on a CPU came with torch 2.2")
def test_a_failing_target_shows_the_workers_last_words(tmp_path: Path, data: Path) -> None:
    """A target whose features overflow in float16."""
    target = make_target(tmp_path / "target", tied=True)
    weights = load_file(target / "model.safetensors")
    weights["model.norm.weight"] = torch.full_like(weights["model.norm.weight"], 1e6)
    save_file(weights, target / "model.safetensors", metadata={"format": "pt"})
    answer = command(
        "allocation.py", "--outdir", tmp_path / "store", "--model_name", target, "--data_path", data,
        "--dtype", "float16", code=1,
    )  # fmt: skip
    assert answer.error.count("error: worker 0 (cards 0) exited with code 1") == 1
    assert "are not finite in float16" in answer.error
    assert "use --dtype bfloat16 or float32" in answer.error
    assert "Traceback" not in answer.err


def test_a_deleted_shard_is_made_again(job: list[object], undisturbed: Path, tmp_path: Path) -> None:
    """What the message about a damaged file tells people to do, on a finished store."""
    outdir = tmp_path / "store"
    shutil.copytree(undisturbed, outdir)
    shard_paths(outdir / "0")[1].unlink()
    shard_paths(outdir / "1")[2].unlink()
    command(*job, "--outdir", outdir)
    assert contents(outdir) == contents(undisturbed)


def test_a_killed_job_goes_on_with_other_workers(
    job: list[object], undisturbed: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Two workers, then one with larger batches, then three: every conversation once, equal to float32's noise."""
    outdir = tmp_path / "store"
    for reached, changes in ((1, []), (3, ["--npu_indices", "0", "--batch_tokens", 300])):
        process = start(*job, *changes, "--outdir", outdir)
        wait_until(lambda reached=reached: shards(outdir) >= reached, process)
        process.kill()
        process.communicate()
        wait_until(lambda: not workers_of(outdir))
    kept = contents(outdir)
    assert 0 < len(kept) < CONVERSATIONS, "the kills came too soon or too late to matter"
    refused = ask(allocation.main, capsys, *job[1:], "--npu_indices", "0,1,2", "--max_length", 99, "--outdir", outdir)
    assert refused.code == 2
    assert "max_length was 2048, now 99" in refused.error
    answer = command(*job, "--npu_indices", "0,1,2", "--outdir", outdir)
    assert f"{CONVERSATIONS - len(kept):,} records" in answer.out, "it computes what is missing and no more"
    assert set(kept) < set(contents(outdir))
    found, expected = check_store(outdir), check_store(undisturbed)
    assert found.damage == [] and found.complete
    assert found.token_digest == expected.token_digest
    for a, b in zip(FeatureStore(outdir), FeatureStore(undisturbed), strict=True):
        torch.testing.assert_close(a.hidden_state, b.hidden_state, rtol=1e-4, atol=1e-5)
