"""A worker: its batches, the memory it needs, and what it does again after it was killed."""

import shutil

import numpy as np
import pytest

from eagle.data import tokens as tokens_module
from eagle.errors import WorkError
from eagle.generate.job import claim_outdir, encode_job, finish, resolve
from eagle.generate.progress import finished, missing
from eagle.generate.worker import batches
from eagle.store.manifest import DONE
from eagle.store.shard import Shard, shard_paths
from tests.tiny import conversations, cpu_worker, make_target, write_sharegpt
from tests.unit.test_job import request

#: No question, and no reply: dropped; a reply before the first question: mended. At both ends of the file.
DIRTY = [
    {"conversations": []},
    {"conversations": [{"from": "human", "value": "?"}]},
    {"conversations": [{"from": "gpt", "value": "hi"}, *conversations(1)[0]["conversations"]]},
]
BATCH_TOKENS, SHARD_BYTES = 512, 1 << 18


@pytest.fixture(scope="module")
def job(tmp_path_factory):
    """A claimed and encoded job of one worker, several length blocks long."""
    folder = tmp_path_factory.mktemp("job")
    inputs = make_target(folder / "model"), write_sharegpt(folder / "data.json", [*DIRTY, *conversations(150), *DIRTY])
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(tokens_module, "LENGTH_BLOCK", 32)
        made = resolve(request(inputs, folder / "store", batch_tokens=BATCH_TOKENS))
        claim_outdir(made)
        encode_job(made)
        yield made


def work(job, outdir, shard_bytes):
    """The worker's progress behind every batch."""
    return list(cpu_worker(outdir, 0).work(shard_bytes))


def contents(outdir):
    """By shard what it holds, to the bit, and the progress it carries."""
    paths = shard_paths(outdir / "0")
    shards = {path.name: [(r.conversation, r.crc32()) for r in map(Shard(path).read, range(len(Shard(path))))]
              for path in paths}  # fmt: skip
    return shards, finished(outdir / "0")


@pytest.fixture
def outdir(job, tmp_path):
    return shutil.copytree(job.request.folder, tmp_path / "store")


def lengths_in_blocks(count, block=1024):
    lengths = np.random.RandomState(0).lognormal(6, 1, count).clip(3, 2048).astype(int)
    return [int(x) for at in range(0, count, block) for x in sorted(lengths[at : at + block], reverse=True)]


def test_batches_cover_everything_and_are_bounded():
    lengths = [*lengths_in_blocks(3000), 5000]
    found = list(batches(lengths, 4096))
    assert [index for batch in found for index in batch] == list(range(len(lengths)))
    padded = [max(lengths[index] for index in batch) * len(batch) for batch in found]
    assert all(size <= 4096 or len(batch) == 1 for size, batch in zip(padded, found, strict=True))
    assert 1 - sum(lengths) / sum(padded) < 0.02, "little is padding"
    assert list(batches([], 4096)) == []


def test_batches_go_on_the_same_behind_any_of_them():
    lengths = lengths_in_blocks(400, block=64)
    found = list(batches(lengths, 4096))
    for number, batch in enumerate(found):
        assert list(batches(lengths, 4096, batch.stop)) == found[number + 1 :]


def test_no_shard_waits_for_more_than_one_batch(job, outdir):
    """What bounds a worker's memory: a shard is closed as soon as it is full, however long the conversations are."""
    work(job, outdir, SHARD_BYTES)
    shards = [Shard(path) for path in shard_paths(outdir / "0")]
    row = 32 * 2
    batch = row * max(BATCH_TOKENS, *(shard.lengths.max() for shard in shards))
    assert len(shards) > 5 and batch < SHARD_BYTES / 4
    assert all(SHARD_BYTES <= shard.tokens * row < SHARD_BYTES + batch for shard in shards[:-1])


def test_killed_behind_any_shard(job, outdir, tmp_path):
    """To the bit, in bfloat16: the batches after it are those of a run that nothing happened to."""
    work(job, outdir, SHARD_BYTES)
    undisturbed = contents(outdir)
    for kept in range(len(undisturbed[0])):
        again = shutil.copytree(outdir, tmp_path / f"killed behind {kept}")
        (again / "0" / DONE).unlink()
        for path in shard_paths(again / "0")[kept:]:
            path.unlink()
        before = missing(again / "0")[-1].begin
        reported = work(job, again, SHARD_BYTES)
        assert contents(again) == undisturbed
        if kept:
            assert reported[0].records > before.records > 0


def test_dirty_records_are_counted_once_whatever_happens(job, outdir):
    """Those at the start of the share and those at its end, in one run and in one that was interrupted."""
    work(job, outdir, SHARD_BYTES)
    done = finished(outdir / "0")
    assert done.records == 152
    assert dict(done.tally.repaired) == {"leading_reply_skipped": 2}
    assert dict(done.tally.dropped) == {"empty_conversation": 2, "no_assistant_turn": 2}
    (outdir / "0" / DONE).unlink()
    shard_paths(outdir / "0")[-1].unlink()
    work(job, outdir, SHARD_BYTES)
    assert finished(outdir / "0") == done


def test_a_worker_with_a_missing_shard_is_not_finished(job, outdir):
    work(job, outdir, SHARD_BYTES)
    assert finished(outdir / "0")
    shards = [Shard(path) for path in shard_paths(outdir / "0")]
    shards[1].path.unlink()
    assert finished(outdir / "0") is None
    gap, end = missing(outdir / "0")
    assert (gap.first, gap.shards, gap.begin.records) == (1, 1, len(shards[0]))
    assert gap.end == len(shards[0]) + len(shards[1])
    assert end.begin.records == sum(map(len, shards)) and end.end is None


@pytest.mark.parametrize("gone", [[0], [2], [1, 2, 4], [0, 3, 4, -1]], ids=str)
@pytest.mark.parametrize("with_done", [True, False])
def test_shards_that_were_deleted_are_computed_again_and_no_others(job, outdir, gone, with_done):
    work(job, outdir, SHARD_BYTES)
    undisturbed, paths = contents(outdir), shard_paths(outdir / "0")
    if not with_done:
        (outdir / "0" / DONE).unlink()
    lost = [paths[number] for number in gone]
    records = sum(len(Shard(path)) for path in lost)
    for path in lost:
        path.unlink()
    kept = {path: path.stat().st_ino for path in shard_paths(outdir / "0")}
    reported = work(job, outdir, SHARD_BYTES)
    assert contents(outdir) == undisturbed
    assert {path: path.stat().st_ino for path in kept} == kept, "not written again"
    assert reported[-1].records == undisturbed[1].records
    assert reported[0].records > undisturbed[1].records - records


@pytest.mark.parametrize("shard_bytes", [SHARD_BYTES // 8, SHARD_BYTES * 8])
def test_deleted_shards_are_filled_in_whatever_size_shards_have_now(job, outdir, shard_bytes):
    work(job, outdir, SHARD_BYTES)
    paths = shard_paths(outdir / "0")
    whole = sorted(entry for shard in contents(outdir)[0].values() for entry in shard)
    for number in (1, 2, 4):
        paths[number].unlink()
    work(job, outdir, shard_bytes)
    assert shard_paths(outdir / "0") == paths and finished(outdir / "0")
    assert sorted(entry for shard in contents(outdir)[0].values() for entry in shard) == whole


def test_a_shard_that_does_not_belong_there_is_named(job, outdir):
    work(job, outdir, SHARD_BYTES)
    paths = shard_paths(outdir / "0")
    shutil.copyfile(paths[1], paths[3])
    with pytest.raises(WorkError, match=f"{paths[3].name} does not follow"):
        missing(outdir / "0")


@pytest.mark.parametrize("content", ["", "{", "[]", '{"records": 3}'])
def test_damaged_counts_are_made_anew(job, outdir, content):
    work(job, outdir, SHARD_BYTES)
    done = finished(outdir / "0")
    (outdir / "0" / DONE).write_text(content)
    assert finished(outdir / "0") is None
    assert work(job, outdir, SHARD_BYTES) == [done] == [finished(outdir / "0")]


def test_manifest_adds_up_the_workers(tmp_path):
    inputs = make_target(tmp_path / "model"), write_sharegpt(tmp_path / "data.json", [*DIRTY, *conversations(20)])
    made = resolve(request(inputs, tmp_path / "store", npu_indices=(0, 1)))
    claim_outdir(made)
    encode_job(made)
    for number in (0, 1):
        list(cpu_worker(tmp_path / "store", number).work(1 << 20))
    manifest = finish(made)
    assert manifest["records"] == 21
    assert sum(manifest["dropped"].values()) == 2 and manifest["repaired"] == {"leading_reply_skipped": 1}
