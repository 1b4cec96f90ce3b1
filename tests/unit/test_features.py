"""The store: what is written comes back, what is unfinished or damaged is not seen."""

import json
import pickle
from itertools import pairwise

import numpy as np
import pytest
import torch

from eagle.errors import RequestError, WorkError
from eagle.files import write_json
from eagle.store.damage import Replaced
from eagle.store.manifest import MANIFEST
from eagle.store.reader import FeatureStore
from eagle.store.record import Record
from eagle.store.reshard import cut_evenly
from eagle.store.shard import FORMAT_VERSION, Shard, shard_paths, write_shard
from eagle.store.writer import ShardWriter


def record(conversation: int, length: int, hidden: int = 8, dtype: torch.dtype = torch.bfloat16) -> Record:
    generator = torch.Generator().manual_seed(conversation)
    return Record(
        conversation,
        torch.randint(100, (length,), generator=generator, dtype=torch.int32),
        torch.randint(2, (length,), generator=generator, dtype=torch.uint8),
        torch.randn(length, hidden, generator=generator).to(dtype),
    )


def equal(left: Record, right: Record) -> bool:
    return left.conversation == right.conversation and all(
        torch.equal(getattr(left, name), getattr(right, name)) for name in ("input_ids", "loss_mask", "hidden_state")
    )


def manifest(folder, digest="d", fingerprint="f"):
    content = {
        "format_version": FORMAT_VERSION,
        "target": {"name": "t", "fingerprint": fingerprint},
        "data": {"digest": digest},
    }
    write_json(folder / MANIFEST, content)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
def test_round_trip(tmp_path, dtype):
    records = [record(number, 3 + number, dtype=dtype) for number in (4, 1, 7)]
    (tmp_path / "0").mkdir()
    write_shard(tmp_path / "0" / "shard-00000.safetensors", records)
    store = FeatureStore(tmp_path)
    assert [r.conversation for r in store] == [1, 4, 7]
    by_number = {r.conversation: r for r in records}
    assert all(equal(store[i], by_number[store[i].conversation]) for i in range(3))
    assert store.tokens == sum(len(r) for r in records)
    assert store.lengths.tolist() == [len(by_number[n]) for n in (1, 4, 7)]
    assert torch.equal(store.loss_mask(0), by_number[1].loss_mask)


def test_order_does_not_depend_on_workers_or_shards(tmp_path):
    records = [record(number, 4) for number in range(9)]
    for workers in (1, 2, 3):
        root = tmp_path / str(workers)
        for worker in range(workers):
            writer = ShardWriter(root / str(worker), shard_bytes=100)
            for item in reversed(records[worker::workers]):
                writer.add(item)
                if writer.is_full:
                    writer.close_shard()
            writer.close_shard()
        manifest(root)
        assert [equal(a, b) for a, b in zip(FeatureStore(root), records, strict=True)] == [True] * 9


def test_writer_resumes_behind_the_last_finished_shard(tmp_path):
    writer = ShardWriter(tmp_path)
    writer.add(record(0, 4))
    writer.close_shard("first")
    writer.close_shard("nothing was added, so nothing is written")
    (tmp_path / ".shard-00001.safetensors.tmp").write_bytes(b"half")  # a killed writer's
    again = ShardWriter(tmp_path)
    assert Shard(shard_paths(tmp_path)[-1]).progress == "first"
    assert not list(tmp_path.glob(".*.tmp"))
    again.add(record(1, 4))
    again.close_shard("second")
    assert [path.name for path in shard_paths(tmp_path)] == ["shard-00000.safetensors", "shard-00001.safetensors"]
    assert Shard(shard_paths(tmp_path)[-1]).progress == "second"


def test_unfinished_and_foreign_files_are_not_seen(tmp_path):
    write_shard(tmp_path / "shard-00000.safetensors", [record(0, 4)])
    (tmp_path / ".shard-00001.safetensors.tmp").write_bytes(b"half")
    (tmp_path / "shard-notes.safetensors").write_bytes(b"?")
    (tmp_path / "readme.txt").write_text("?")
    assert len(FeatureStore(tmp_path)) == 1


def test_every_flipped_bit_of_a_record_is_found(tmp_path):
    path = tmp_path / "shard-00000.safetensors"
    item = record(5, 3, hidden=4)
    write_shard(path, [item])
    whole = path.read_bytes()
    header_end = 8 + int.from_bytes(whole[:8], "little")
    header = json.loads(whole[8:header_end])
    for name in ("hidden_state", "input_ids", "loss_mask"):
        first, last = (header_end + offset for offset in header[name]["data_offsets"])
        for at in range(first, last):
            path.write_bytes(whole[:at] + bytes([whole[at] ^ 4]) + whole[at + 1 :])
            with pytest.raises(WorkError, match=r"shard-00000.safetensors is damaged.*record 0 \(conversation 5\)"):
                Shard(path).read(0)


def test_truncated_shard_is_named(tmp_path):
    path = tmp_path / "shard-00000.safetensors"
    write_shard(path, [record(0, 30)])
    path.write_bytes(path.read_bytes()[:-7])
    with pytest.raises(WorkError, match=r"shard-00000.safetensors is damaged"):
        FeatureStore(tmp_path)


def test_what_cannot_be_written_leaves_nothing(tmp_path, monkeypatch):
    def full(path, *_, **__):
        path.write_bytes(b"half")
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("eagle.store.shard.write_pieces", full)
    with pytest.raises(WorkError, match=r"Could not write .*No space left.*run the same command again"):
        write_shard(tmp_path / "shard-00000.safetensors", [record(0, 4)])
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(
    ("make", "says"),
    [
        (lambda root: None, "no finished records"),
        (
            lambda root: [
                write_shard(root / "shard-00000.safetensors", [record(0, 3)]),
                write_shard(root / "shard-00001.safetensors", [record(1, 3, hidden=16)]),
            ],
            "mixes stores",
        ),
        (
            lambda root: [
                write_shard(root / "shard-00000.safetensors", [record(0, 3)]),
                write_shard(root / "shard-00001.safetensors", [record(0, 3)]),
            ],
            "more than once",
        ),
        (lambda root: (root / ".reshard-moving").mkdir(), "resharding was interrupted"),
        (lambda root: write_json(root / MANIFEST, {"format_version": 99}), "no finished records"),
        (
            lambda root: [
                write_json(root / MANIFEST, {"format_version": 99}),
                write_shard(root / "shard-00000.safetensors", [record(0, 3)]),
            ],
            "store format 99",
        ),
    ],
)
def test_stores_that_cannot_be_used(tmp_path, make, says):
    make(tmp_path)
    with pytest.raises(RequestError, match=says):
        FeatureStore(tmp_path)


def test_missing_store(tmp_path):
    with pytest.raises(FileNotFoundError, match="--tmpdir"):
        FeatureStore(tmp_path / "no")


def test_other_target_is_refused(tmp_path):
    manifest(tmp_path, fingerprint="aaaa")
    write_shard(tmp_path / "shard-00000.safetensors", [record(0, 3)])
    store = FeatureStore(tmp_path)
    store.check_target("aaaa", tmp_path)
    with pytest.raises(RequestError, match="is another model"):
        store.check_target("bbbb", tmp_path)


def test_two_data_files_may_number_their_conversations_alike(tmp_path):
    for name in "ab":
        (tmp_path / name / "0").mkdir(parents=True)
        manifest(tmp_path / name, digest=name)
        write_shard(tmp_path / name / "0" / "shard-00000.safetensors", [record(0, 3), record(1, 3)])
    assert [r.conversation for r in FeatureStore(tmp_path)] == [0, 1, 0, 1]


def test_travels_to_data_loader_workers(tmp_path):
    write_shard(tmp_path / "shard-00000.safetensors", [record(3, 4)])
    store = FeatureStore(tmp_path)
    assert len(store[0]) == 4  # the mapping is open now
    assert equal(pickle.loads(pickle.dumps(store))[0], record(3, 4))


def test_classic_dumps(tmp_path):
    for folder, number in (("0", 0), ("0", 10), ("1", 2)):
        item = record(number, 5)
        (tmp_path / folder).mkdir(exist_ok=True)
        content = {
            "input_ids": item.input_ids.long(),
            "loss_mask": item.loss_mask.long(),
            "hidden_state": item.hidden_state,
        }
        torch.save(content, tmp_path / folder / f"data_{number}.ckpt")
    store = FeatureStore(tmp_path)
    assert [r.conversation for r in store] == [0, 2, 10]
    assert all(equal(r, record(r.conversation, 5)) for r in store)
    (tmp_path / "0" / "data_0.ckpt").unlink()
    shorter = {name: tensor[:4] for name, tensor in content.items()}
    torch.save(shorter, tmp_path / "1" / "data_2.ckpt")
    for index in range(2):
        with pytest.raises(Replaced):
            store[index]
    (tmp_path / "1" / "data_2.ckpt").write_bytes(b"\x80\x02damaged")
    with pytest.raises(WorkError, match=r"data_2.ckpt cannot be read"):
        FeatureStore(tmp_path)


def test_classic_dump_never_runs_code(tmp_path):
    class Evil:
        def __reduce__(self):
            return (open, (str(tmp_path / "made by the pickle"), "w"))

    torch.save({"input_ids": Evil(), "loss_mask": Evil(), "hidden_state": Evil()}, tmp_path / "data_0.ckpt")
    with pytest.raises(WorkError, match=r"data_0.ckpt cannot be read"):
        FeatureStore(tmp_path)
    assert not (tmp_path / "made by the pickle").exists()


@pytest.mark.parametrize("parts", [1, 2, 3, 8])
def test_cut_evenly(parts):
    lengths = np.random.RandomState(0).randint(10, 2000, 400)
    cuts = cut_evenly(lengths, parts)
    assert cuts[0] == 0 and cuts[-1] == len(lengths) and cuts == sorted(cuts)
    sums = [lengths[a:b].sum() for a, b in pairwise(cuts)]
    assert sum(sums) == lengths.sum()
    assert max(sums) - min(sums) <= 2 * lengths.max()


@pytest.mark.parametrize(
    "lengths", [[2048, *[60] * 7], [*[60] * 7, 2048], [60, 60, 60, 2048, 2048, 60, 60, 60], [5] * 8]
)
@pytest.mark.parametrize("parts", [1, 2, 3, 4, 7, 8])
def test_no_part_is_left_empty(lengths, parts):
    """However long the longest record is."""
    cuts = cut_evenly(np.array(lengths), parts)
    assert cuts[0] == 0 and cuts[-1] == 8 and len(cuts) == parts + 1
    assert all(after > before for before, after in pairwise(cuts))


def test_what_a_long_record_leaves_is_shared():
    assert cut_evenly(np.array([2048, *[60] * 7]), 4) == [0, 1, 3, 5, 8]


def test_order_and_groups_of_any_store(tmp_path):
    """Against the definition: sorted by data file, conversation, file and place; numbered as they come."""
    random = np.random.RandomState(0)
    counts = {"": None, "a": 5, "b": 100}
    for name, count in counts.items():
        folder = tmp_path / (name or "unknown")
        used = random.permutation(30).tolist()
        for number in range(4):
            own = random.randint(0, 6, 7).tolist() if not name else [used.pop() for _ in range(7)]
            (folder / str(number)).mkdir(parents=True)
            write_shard(folder / str(number) / "shard-00000.safetensors", [record(c, 3 + c % 4) for c in own])
        manifest(folder, digest=name)
        content = json.loads((folder / MANIFEST).read_text())
        write_json(folder / MANIFEST, content | {"data": {"digest": name, "records": count}})
    store = FeatureStore(tmp_path)

    entries = sorted(
        (digest, int(conversation), number, position)
        for number, (digest, source) in enumerate(zip(store._digests, store.sources, strict=True))
        for position, conversation in enumerate(source.conversations)
    )
    numbers, groups = {}, []
    for index, (digest, conversation, _, _) in enumerate(entries):
        count = counts[digest]
        key = (digest, conversation % count if count else conversation) if digest else index
        groups.append(numbers.setdefault(key, len(numbers)))
    assert store.groups.tolist() == groups and max(groups) < len(groups) - 5
    for index, (_, conversation, number, position) in enumerate(entries):
        assert equal(store[index], store.sources[number].read(position))
        assert store[index].conversation == conversation and len(store[index]) == store.lengths[index]
    assert store.by_file() == sorted(range(len(entries)), key=lambda index: entries[index][2:])
    masks = [store.loss_mask(index).numpy() for index in range(len(store))]
    assert store.supervised().tolist() == [int((mask[1:-1] & mask[2:]).sum()) for mask in masks]
    left = [entry for index, entry in enumerate(entries) if index not in (0, 5, 6, 40)]
    store.leave_out([40, 0, 6, 5])
    assert [item.conversation for item in store] == [conversation for _, conversation, _, _ in left]
