"""Resharding: the new folders hold about equal tokens."""

import json

import numpy as np
import pytest
import torch

from eagle.errors import RequestError
from eagle.store.reader import FeatureStore
from eagle.store.record import Record
from eagle.store.reshard import preview, reshard
from eagle.store.writer import ShardWriter


def make_store(root, lengths, workers=3, shard_bytes=20_000):
    """A store of records of those lengths, one feature wide."""
    for worker in range(workers):
        writer = ShardWriter(root / str(worker), shard_bytes=shard_bytes)
        for number in range(worker, len(lengths), workers):
            length = int(lengths[number])
            ids, mask = torch.arange(length, dtype=torch.int32), torch.ones(length, dtype=torch.uint8)
            writer.add(Record(number, ids, mask, torch.full((length, 1), number, dtype=torch.bfloat16)))
            if writer.is_full:
                writer.close_shard()
        writer.close_shard()
    manifest = {"format_version": 1, "target": {"name": "t", "fingerprint": "f"}, "data": {"digest": "d"}}
    (root / "manifest.json").write_text(json.dumps({**manifest, "complete": True}))
    return root


def tokens_of(root, parts):
    return np.array([FeatureStore(root / str(part)).tokens for part in range(parts)])


@pytest.mark.parametrize("order", ["shuffled", "longest first"])
@pytest.mark.parametrize("parts", [2, 3, 8])
def test_folders_hold_equal_tokens(tmp_path, parts, order):
    """Within 2% of their mean, whatever the lengths of many records and wherever the shards are cut."""
    lengths = np.random.RandomState(parts).lognormal(5.5, 1.2, 3000).clip(3, 2048).astype(int)
    if order == "longest first":
        lengths = np.sort(lengths)[::-1]
    root = make_store(tmp_path / "old", lengths)
    expected, _ = preview(root, parts)
    summary = reshard(root, tmp_path / "new", parts)
    found = tokens_of(tmp_path / "new", parts)
    assert summary == expected
    assert [part.tokens for part in summary] == found.tolist()
    assert found.sum() == lengths.sum()
    assert abs(found / found.mean() - 1).max() < 0.02, found


@pytest.mark.parametrize("parts", [2, 4])
def test_a_record_larger_than_that_is_the_only_excuse(tmp_path, parts):
    lengths = np.random.RandomState(0).randint(3, 40, 60)
    lengths[31] = 900
    root = make_store(tmp_path / "old", lengths)
    reshard(root, tmp_path / "new", parts)
    found = tokens_of(tmp_path / "new", parts)
    assert abs(found - found.mean()).max() <= max(lengths.max(), 0.02 * found.mean())
    assert (found > 0).all()


def test_an_unfinished_store_is_not_resharded_in_place(tmp_path):
    """Data generation could not go on in it; into another folder it may be."""
    root = make_store(tmp_path / "old", [5] * 12)
    content = json.loads((root / "manifest.json").read_text())
    (root / "manifest.json").write_text(json.dumps(content | {"complete": False}))
    before = sorted(root.rglob("*.safetensors"))
    with pytest.raises(RequestError, match="has not finished"):
        reshard(root, root, 2)
    assert sorted(root.rglob("*.safetensors")) == before
    assert sum(part.records for part in reshard(root, tmp_path / "new", 2)) == 12


def test_what_is_cut_off_a_large_file_is_one_file(tmp_path, monkeypatch):
    """However small shards are by default."""
    root = make_store(tmp_path / "old", [50] * 200, workers=1, shard_bytes=1 << 30)
    monkeypatch.setattr("eagle.store.writer.SHARD_BYTES", 1000)
    reshard(root, tmp_path / "new", 3)
    assert len(list((tmp_path / "new").rglob("shard-*.safetensors"))) == 3
    assert len(FeatureStore(tmp_path / "new")) == 200
