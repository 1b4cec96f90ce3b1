"""A job that goes on with another number of workers: what is left is dealt anew, each row computed once."""

import json
import random
import shutil

import pytest
import torch

from eagle.errors import WorkError
from eagle.generate import dealing, worker
from eagle.generate.dealing import CONTINUED, LEFT, begin, is_done, left_by_worker, worker_folders
from eagle.generate.job import claim_outdir, encode_job, finish, resolve
from eagle.generate.plan import make_plan
from eagle.generate.worker import Share
from eagle.store.manifest import DONE, MANIFEST
from eagle.store.reader import FeatureStore
from eagle.store.shard import Shard, shard_paths
from eagle.store.verify import check_store
from eagle.store.writer import ShardWriter
from tests.tiny import conversations, cpu_worker, make_target, write_sharegpt
from tests.unit.test_job import request

COUNT, SHARD_BYTES = 60, 30_000


@pytest.fixture(autouse=True)
def in_the_foreground(monkeypatch):
    """A worker that is killed writes no more; one that a test leaves alone would."""
    monkeypatch.setattr(
        worker, "ShardWriter", lambda *args, **kwargs: ShardWriter(*args, **{**kwargs, "background": False})
    )


@pytest.fixture(scope="module")
def inputs(tmp_path_factory):
    """Of the conversations one cannot be used, and one takes a mend."""
    folder = tmp_path_factory.mktemp("dealing")
    late = [{"from": "gpt", "value": "hi"}, *conversations(1)[0]["conversations"]]
    dirty = [{"conversations": []}, {"conversations": late}]
    data = write_sharegpt(folder / "data.json", [*conversations(COUNT, turns=1), *dirty])
    return make_target(folder / "model", hidden=16, layers=1), data


def started(inputs, outdir, workers, batch_tokens=256):
    """The job as its parent leaves it to so many workers, and its tokens."""
    cards = tuple(range(workers))
    job = resolve(request(inputs, outdir, npu_indices=cards, dtype="float32", batch_tokens=batch_tokens))
    claim_outdir(job)
    tokens = encode_job(job)
    begin(tokens, job.manifest, outdir)
    return job, tokens


def work(outdir, number, shards=None):
    """What a worker does until it is killed behind so many shards, or to its end."""
    (outdir / str(number)).mkdir(exist_ok=True)
    there = len(shard_paths(outdir / str(number)))
    for _ in cpu_worker(outdir, number).work(SHARD_BYTES):
        if shards is not None and len(shard_paths(outdir / str(number))) >= there + shards:
            return


def whole(inputs, outdir, workers, **changes):
    job, _ = started(inputs, outdir, workers, **changes)
    for number in range(workers):
        work(outdir, number)
    return finish(job)


@pytest.fixture(scope="module")
def undisturbed(inputs, tmp_path_factory):
    outdir = tmp_path_factory.mktemp("undisturbed") / "store"
    return outdir, whole(inputs, outdir, 2)


def assert_same(outdir, undisturbed):
    """Every record once, the same tokens, features to float32's noise, and counts that are true."""
    found, expected = check_store(outdir), check_store(undisturbed)
    assert found.damage == [] and found.complete
    assert found.token_digest == expected.token_digest
    assert (found.dropped, found.repaired) == (expected.dropped, expected.repaired)
    for a, b in zip(FeatureStore(outdir), FeatureStore(undisturbed), strict=True):
        assert a.conversation == b.conversation
        torch.testing.assert_close(a.hidden_state, b.hidden_state, rtol=1e-4, atol=1e-5)
    assert not [path.name for path in outdir.iterdir() if path.name.startswith(".") and path.name != ".lock"]


@pytest.mark.parametrize("seed", range(3))
def test_any_sequence_of_workers(inputs, undisturbed, tmp_path, seed):
    """Killed at random shards, with others deleted, by 1 to 5 workers and batches of other sizes."""
    store, moments = tmp_path / "store", random.Random(seed)
    for workers in [2, *(moments.choice([1, 2, 3, 5]) for _ in range(4))]:
        started(inputs, store, workers, batch_tokens=moments.choice([1, 256, 1024]))
        for number in moments.sample(range(workers), moments.randint(1, workers)):
            work(store, number, shards=1)
        there = [path for folder in worker_folders(store) for path in shard_paths(folder)]
        if moments.random() < 0.5 and len(there) > 1:
            moments.choice(there).unlink()
    manifest = whole(inputs, store, 3, batch_tokens=512)
    assert_same(store, undisturbed[0])
    same = ("records", "tokens", "supervised_tokens", "dropped", "repaired", "first_dropped")
    assert {name: manifest[name] for name in same} == {name: undisturbed[1][name] for name in same}
    assert (manifest["options"]["workers"], manifest["options"]["batch_tokens"]) == (3, 512)


def test_what_is_left_is_planned_and_no_more(inputs, undisturbed, tmp_path):
    store = tmp_path / "store"
    started(inputs, store, 3)
    for number in (0, 2):
        work(store, number, shards=1)
    held = FeatureStore(store)
    job = resolve(request(inputs, store, npu_indices=(0, 1), dtype="float32"))
    before = {path: path.stat().st_mtime_ns for path in store.rglob("*")}
    tokens = encode_job(job)
    plan = make_plan(job, tokens)
    assert sum(worker.records for worker in plan.workers) == COUNT + 1 - len(held)
    assert sum(worker.tokens for worker in plan.workers) == int(tokens.lengths.sum()) - held.tokens
    shares = left_by_worker(tokens, job.manifest, store, 2)
    assert abs(len(shares[0]) - len(shares[1])) <= 1 and not set(shares[0]) & set(shares[1])
    assert {path: path.stat().st_mtime_ns for path in store.rglob("*")} == before, "a plan changes nothing"
    begin(tokens, job.manifest, store)
    assert [Share(store, number).places for number in (0, 1)] == shares
    assert sum(Share(store, number).held.tokens for number in (0, 1)) == held.tokens


def test_killed_between_any_two_steps_of_beginning_again(inputs, undisturbed, tmp_path, monkeypatch):
    """The folder that each step leaves is begun from again, by the former workers and by others."""
    store = tmp_path / "store"
    whole(inputs, store, 2)
    shard_paths(store / "0")[0].unlink()
    for step in ("write_tensors", "write_json", "forget_done"):
        for workers in (3, 2):
            copy = shutil.copytree(store, tmp_path / f"{step} {workers}")
            with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
                patch.setattr(dealing, step, lambda *_: (_ for _ in ()).throw(KeyboardInterrupt))
                started(inputs, copy, 3)
            whole(inputs, copy, workers)
            assert_same(copy, undisturbed[0])


def test_a_finished_store_needs_nothing_whatever_the_workers(inputs, undisturbed, tmp_path):
    store = shutil.copytree(undisturbed[0], tmp_path / "store")
    assert is_done(store)
    shard_paths(store / "1")[-1].unlink()
    assert not is_done(store)
    whole(inputs, store, 1)
    assert is_done(store) and (store / "1" / DONE).is_file(), "folders beyond the new count are counted"
    before = (store / MANIFEST).read_bytes()
    finish(resolve(request(inputs, store, npu_indices=(0, 1, 2), dtype="float32")))
    assert (store / MANIFEST).read_bytes() == before
    for lost in (shard_paths(store / "0")[0], store / "1" / DONE):
        copy = shutil.copytree(store, tmp_path / lost.name)
        (copy / lost.relative_to(store)).unlink()
        assert not is_done(copy)


def test_shards_say_nothing_of_a_share_that_they_are_not_of(inputs, tmp_path):
    """So that whoever reads them as one, as earlier versions would, stops."""
    store = tmp_path / "store"
    started(inputs, store, 2)
    work(store, 0, shards=1)
    there = set(shard_paths(store / "0"))
    whole(inputs, store, 1)
    for path in shard_paths(store / "0"):
        assert (json.loads(Shard(path).progress) == {}) == (path not in there)


@pytest.mark.parametrize("fault", ["twice", "foreign"])
def test_a_shard_that_does_not_belong_there_is_named(inputs, undisturbed, tmp_path, fault):
    store = shutil.copytree(undisturbed[0], tmp_path / "store")
    shard_paths(store / "0")[0].unlink()
    stray = store / "1" / "shard-00077.safetensors"
    if fault == "twice":
        shutil.copyfile(shard_paths(store / "1")[0], stray)
    else:
        more = write_sharegpt(tmp_path / "more.json", conversations(100, turns=2))
        other = tmp_path / "other"
        whole((inputs[0], more), other, 1)
        shutil.copyfile(shard_paths(other / "0")[0], stray)
    said = "another shard of this store holds too" if fault == "twice" else "which this job has not"
    with pytest.raises(WorkError, match=f"{stray.name} holds conversation.*{said}"):
        started(inputs, store, 3)
    stray.unlink()
    whole(inputs, store, 3)
    assert_same(store, undisturbed[0])


def test_all_shards_gone_is_a_new_beginning(inputs, undisturbed, tmp_path):
    store = tmp_path / "store"
    whole(inputs, store, 2)
    shard_paths(store / "0")[0].unlink()
    whole(inputs, store, 3)
    for folder in worker_folders(store):
        for path in shard_paths(folder):
            path.unlink()
    assert "redealt" not in whole(inputs, store, 2) and not (store / LEFT).exists()
    assert_same(store, undisturbed[0])


@pytest.mark.parametrize("batch_tokens", [1, 10_000])
def test_deleted_shards_are_filled_in_with_batches_of_another_size(inputs, undisturbed, tmp_path, batch_tokens):
    """By the same workers, each in its share: even where what was three shards is one batch now."""
    store = shutil.copytree(undisturbed[0], tmp_path / "store")
    names = [path.name for path in shard_paths(store / "0")]
    assert len(names) > 4
    for path in shard_paths(store / "0")[1:4]:
        path.unlink()
    assert "redealt" not in whole(inputs, store, 2, batch_tokens=batch_tokens)
    assert [path.name for path in shard_paths(store / "0")] == names
    assert_same(store, undisturbed[0])


@pytest.mark.parametrize("workers", [2, 3], ids=["same workers", "others"])
def test_the_model_is_read_from_the_folder_that_is_named_now(inputs, undisturbed, tmp_path, workers):
    """Which has moved; where it was, there is another of the same shapes."""
    model, data = inputs
    before, now = (shutil.copytree(model, tmp_path / name) for name in ("before", "now"))
    store = tmp_path / "store"
    started((before, data), store, 2)
    work(store, 0, shards=1)
    shutil.rmtree(before)
    make_target(before, hidden=16, layers=1, seed=1)
    whole((now, data), store, workers)
    assert_same(store, undisturbed[0])
    assert json.loads((store / MANIFEST).read_text())["target"]["name"] == str(now)


def test_what_goes_on_with_a_job_is_recorded_beside_what_began_it(inputs, tmp_path):
    store = tmp_path / "store"
    job, tokens = started(inputs, store, 2)
    work(store, 0, shards=1)
    began = json.loads((store / MANIFEST).read_text())
    other = job.manifest | {"engine": {"vllm": "0.33.0"}}
    for _ in range(2):
        begin(tokens, other, store)
    manifest = json.loads((store / MANIFEST).read_text())
    assert manifest["made_by"] == began["made_by"] and "engine" not in manifest and CONTINUED not in began
    assert manifest[CONTINUED] == [{name: other[name] for name in ("made_by", "engine")}]
