"""Checking a store: the summary, what is damaged and where, and going on without it."""

import json

import pytest
import torch

from eagle.entry import run
from eagle.errors import WorkError
from eagle.files import write_json
from eagle.store.manifest import DONE, MANIFEST
from eagle.store.reader import FeatureStore
from eagle.store.reshard import preview, reshard
from eagle.store.shard import Shard
from eagle.store.verify import check_store, main, skip_damaged
from eagle.store.writer import ShardWriter
from tests.unit.test_features import equal, manifest, record

LENGTHS = [4, 40, 41, 600]


def make_store(root, workers=1, order=None, store_dtype="same"):
    records = [record(number, length) for number, length in enumerate(LENGTHS)]
    records = [records[i] for i in order or range(len(records))]
    for worker in range(workers):
        writer = ShardWriter(root / str(worker), shard_bytes=1, store_dtype=store_dtype)
        own = records[worker::workers]
        for item in own:
            writer.add(item)
            if writer.is_full:
                writer.close_shard()
        writer.close_shard()
        write_json(root / str(worker) / DONE, {"records": len(own), "tokens": sum(map(len, own))})
    manifest(root)
    content = json.loads((root / MANIFEST).read_text())
    content |= {"complete": True, "records": 4, "tokens": sum(LENGTHS)}
    write_json(root / MANIFEST, content | {"dropped": {"no_conversation": 3}, "repaired": {}})
    return root


def flip(path, name, at=0):
    """Change one bit of a tensor in a shard."""
    content = bytearray(path.read_bytes())
    start = 8 + int.from_bytes(content[:8], "little")
    content[start + json.loads(content[8:start])[name]["data_offsets"][0] + at] ^= 1
    path.write_bytes(content)


def test_summary(tmp_path, capsys):
    root = make_store(tmp_path)
    summary = check_store(root)
    assert (summary.records, summary.tokens, summary.damage) == (4, sum(LENGTHS), [])
    assert summary.lengths == {0: 1, 32: 2, 512: 1}
    assert summary.supervised_tokens == sum(int(r.loss_mask.sum()) for r in FeatureStore(root))
    assert summary.dropped == {"no_conversation": 3}
    assert run(lambda: main([str(root)])) == 0
    said = capsys.readouterr().out
    assert "4 records, 685 tokens" in said and "32-63 tokens" in said and "dropped       3  no 'conv" in said
    assert run(lambda: main([str(root), "--json"])) == 0
    assert json.loads(capsys.readouterr().out)["content_digest"] == summary.content_digest


def test_digest_depends_on_content_alone(tmp_path):
    one = check_store(make_store(tmp_path / "1"))
    two = check_store(make_store(tmp_path / "2", workers=2, order=[3, 1, 0, 2]))
    assert one.content_digest == two.content_digest
    reshard(tmp_path / "2", tmp_path / "3", 3)
    assert check_store(tmp_path / "3").content_digest == one.content_digest
    (tmp_path / "4").mkdir()
    ShardWriter(tmp_path / "4")
    other = ShardWriter(tmp_path / "4")
    for number, length in enumerate(LENGTHS):
        item = record(number, length)
        item.hidden_state[0, 0] += 1
        other.add(item)
    other.close_shard()
    assert check_store(tmp_path / "4").content_digest != one.content_digest


@pytest.mark.parametrize("name", ["hidden_state", "scale", "input_ids", "loss_mask"])
def test_a_flipped_bit_is_named(tmp_path, capsys, name):
    root = make_store(tmp_path, store_dtype="int8")
    flip(root / "0" / "shard-00001.safetensors", name)
    assert run(lambda: main([str(root)])) == 1
    said = " ".join(capsys.readouterr().err.split())
    assert "shard-00001.safetensors is damaged: the checksum of record 0 (conversation 1)" in said


@pytest.mark.parametrize("name", ["offsets", "conversation", "crc32"])
def test_a_damaged_index_is_found_when_the_file_is_opened(tmp_path, name):
    root = make_store(tmp_path)
    flip(root / "0" / "shard-00001.safetensors", name)
    with pytest.raises(WorkError, match=r"shard-00001.safetensors is damaged: its index"):
        Shard(root / "0" / "shard-00001.safetensors")
    assert "should hold 4 records, but 3 are there" in " ".join(check_store(root).damage)


@pytest.mark.parametrize("what", [b'"format":"', b'"input_ids"', b'"loss_mask"', b'"progress":"'])
def test_a_flipped_bit_in_the_header_is_named(tmp_path, capsys, what):
    root = make_store(tmp_path)
    path = sorted(root.rglob("shard-*.safetensors"))[2]
    content = bytearray(path.read_bytes())
    at = content.index(what) + len(what) - (0 if what.endswith(b':"') else 2)
    content[at] ^= 0x40
    path.write_bytes(content)
    if what == b'"progress":"':  # only data generation reads it
        with pytest.raises(WorkError, match=f"{path.name} is damaged: the checksum of its progress"):
            _ = Shard(path).progress
        return
    assert run(lambda: main([str(root)])) == 1
    assert f"{path.name} is damaged" in capsys.readouterr().err.replace("\n", " ")
    assert len(skip_damaged(root, "--tmpdir")) == 3


def test_a_missing_shard_is_missed(tmp_path):
    root = make_store(tmp_path)
    (root / "0" / "shard-00002.safetensors").unlink()
    damage = check_store(root).damage
    assert len(damage) == 4 and "644 are there" in " ".join(damage)


def damaged_store(tmp_path):
    """Record 0 has a flipped bit, the file of record 3 ends too early."""
    root = make_store(tmp_path)
    flip(root / "0" / "shard-00000.safetensors", "hidden_state")
    path = root / "0" / "shard-00003.safetensors"
    path.write_bytes(path.read_bytes()[:-9])
    return root


def test_skipping_what_is_damaged(tmp_path, capsys):
    root = damaged_store(tmp_path)
    store = skip_damaged(root, "--tmpdir")
    assert [r.conversation for r in store] == [1, 2]
    assert all(equal(r, record(r.conversation, LENGTHS[r.conversation])) for r in store)
    said = capsys.readouterr().err
    assert "1 files and 1 records are left out" in said and "shard-00003" in said and "(conversation 0)" in said


@pytest.mark.parametrize("in_place", [False, True])
def test_resharding_without_what_is_damaged(tmp_path, in_place):
    root = damaged_store(tmp_path / "old")
    new = root if in_place else tmp_path / "new"
    parts = reshard(root, new, 2, leave_out_damaged=True)
    assert [part.records for part in parts] == [1, 1]
    assert check_store(new).damage == []
    assert [r.conversation for r in FeatureStore(new)] == [1, 2]


def test_classic_dumps_without_the_damaged_one(tmp_path):
    for number in range(3):
        item = record(number, 5)
        content = {name: getattr(item, name) for name in ("input_ids", "loss_mask", "hidden_state")}
        torch.save(content, tmp_path / f"data_{number}.ckpt")
    (tmp_path / "data_1.ckpt").write_bytes(b"damaged")
    assert [r.conversation for r in skip_damaged(tmp_path, "--tmpdir")] == [0, 2]


def test_nothing_whole_is_an_error(tmp_path):
    writer = ShardWriter(tmp_path)
    writer.add(record(0, 4))
    writer.close_shard()
    flip(tmp_path / "shard-00000.safetensors", "hidden_state")
    with pytest.raises(WorkError, match="no record in it is whole"):
        skip_damaged(tmp_path, "--tmpdir")


def test_a_reshard_previewed_is_the_reshard_made(tmp_path):
    root = make_store(tmp_path / "old")
    before = sorted(root.rglob("*"))
    parts, rewritten = preview(root, tmp_path / "new", 2)
    assert rewritten == 0  # every cut lies between two files
    assert sorted(root.rglob("*")) == before
    assert reshard(root, tmp_path / "new", 2) == parts
