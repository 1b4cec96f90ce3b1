"""A job killed without warning at twenty random moments ends in the store of a job that nothing happened to."""

from __future__ import annotations

import os
import random
import shutil
import signal
import time
from pathlib import Path

import pytest
import torch

from eagle.generate.job import claim_outdir, encode_job, finish, resolve
from eagle.generate.progress import finished
from eagle.generate.request import GenerationRequest, parse_indices
from eagle.store.reader import FeatureStore
from eagle.store.verify import check_store
from tests.e2e.commands import command, start
from tests.e2e.conftest import contents
from tests.e2e.test_interrupted_generation import wait_until, workers_of
from tests.tiny import conversations, cpu_worker, make_target, write_sharegpt

KILLS = 20

pytestmark = pytest.mark.skipif(not hasattr(os, "fork"), reason="forks")


def whole_job(request: GenerationRequest) -> None:
    """What `allocation.main` and its workers do, in this process."""
    job = resolve(request)
    claim_outdir(job)
    encode_job(job)
    for number in range(len(job.groups)):
        folder = request.folder / str(number)
        folder.mkdir(exist_ok=True)
        if not finished(folder):
            list(cpu_worker(request.folder, number).work(20_000))
    finish(job)


def in_a_child(request: GenerationRequest, seconds: float | None = None) -> int:
    """Run the job in a forked process, which has nothing to import, and kill it after `seconds`. Its exit status."""
    child = os.fork()
    if not child:
        torch.set_num_threads(1)  # the parent's threads are not in the child
        try:
            whole_job(request)
        except BaseException:
            os._exit(1)
        os._exit(0)
    if seconds is not None:
        time.sleep(seconds)
        os.kill(child, signal.SIGKILL)
    return os.waitpid(child, 0)[1]


@pytest.mark.parametrize("store_dtype", ["same", pytest.param("int8", marks=pytest.mark.long)])
def test_twenty_kills(store_dtype: str, tmp_path: Path) -> None:
    target = make_target(tmp_path / "target", tied=True, hidden=16, layers=1)
    data = write_sharegpt(tmp_path / "data.json", conversations(400, turns=1))

    def request(name: str) -> GenerationRequest:
        return GenerationRequest(
            tmp_path / name, str(target), data, npu_indices=(0, 1), dtype="float32", device="cpu", batch_tokens=1,
            store_dtype=store_dtype,
        )  # fmt: skip

    def same_as_undisturbed() -> None:
        assert contents(tmp_path / "killed") == contents(tmp_path / "undisturbed")
        left, right = (check_store(tmp_path / name) for name in ("killed", "undisturbed"))
        assert left.damage == [] and left.content_digest == right.content_digest
        assert not list((tmp_path / "killed").rglob("*.tmp"))
        assert not list((tmp_path / "killed").glob(".tokens*")), "kept until the job is done"

    started = time.monotonic()
    assert in_a_child(request("undisturbed")) == 0
    longest = (time.monotonic() - started) / 2
    moments, kills, reached, kills_with_records = random.Random(0), 0, 0, 0
    while kills < KILLS // 2:
        status = in_a_child(request("killed"), moments.uniform(0, longest))
        if status != signal.SIGKILL:
            # It came too late: the job is done, and another one is killed sooner.
            assert status == 0
            same_as_undisturbed()
            shutil.rmtree(tmp_path / "killed")
            reached, longest = 0, longest * 0.8
            continue
        kills += 1
        if list((tmp_path / "killed").rglob("shard-*.safetensors")):
            found = FeatureStore(tmp_path / "killed")
            assert len(found) >= reached, "what was finished stays"
            reached = len(found)
            kills_with_records += 1
    assert kills_with_records, "every kill came before the first record"
    assert in_a_child(request("killed")) == 0
    same_as_undisturbed()


@pytest.mark.skipif(not Path("/proc/self/cmdline").exists(), reason="finds the workers through /proc")
def test_parent_and_workers_killed_together(job: list[object], undisturbed: Path, tmp_path: Path) -> None:
    outdir = tmp_path / "store"
    process = start(*job, "--outdir", outdir)
    wait_until(lambda: list(outdir.rglob("shard-*.safetensors")), process)
    for pid in [*workers_of(outdir), process.pid]:
        os.kill(pid, signal.SIGKILL)
    process.communicate()
    wait_until(lambda: not workers_of(outdir))
    command(*job, "--outdir", outdir)
    assert contents(outdir) == contents(undisturbed)


def test_the_number_of_workers_changes_nothing(tmp_path: Path) -> None:
    target = make_target(tmp_path / "target", "qwen2", hidden=16, layers=1)
    data = write_sharegpt(tmp_path / "data.json", conversations(60, turns=1))
    for indices in ("0", "0,1,2,3,4,5,6,7"):
        whole_job(
            GenerationRequest(
                tmp_path / indices, str(target), data, npu_indices=parse_indices(indices), dtype="float32", device="cpu"
            )
        )
    one, eight = FeatureStore(tmp_path / "0"), FeatureStore(tmp_path / "0,1,2,3,4,5,6,7")
    for a, b in zip(one, eight, strict=True):
        assert (a.conversation, a.input_ids.tolist(), a.loss_mask.tolist()) == (
            b.conversation, b.input_ids.tolist(), b.loss_mask.tolist()
        )  # fmt: skip
        torch.testing.assert_close(a.hidden_state, b.hidden_state, rtol=1e-4, atol=1e-5)
