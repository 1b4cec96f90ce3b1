"""A store whose records hold more features than the last hidden state, as other draft families need them."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from eagle.drafts.alignment import shift
from eagle.errors import WorkError
from eagle.store.reader import FeatureStore
from eagle.store.record import Record
from eagle.store.reshard import reshard
from eagle.store.verify import check_store
from eagle.store.writer import ShardWriter
from eagle.target.features import HIDDEN_STATE

AUX = "aux"


def record(number: int, length: int) -> Record:
    generator = torch.Generator().manual_seed(number)
    ids = torch.arange(length, dtype=torch.int32)
    mask = torch.ones(length, dtype=torch.uint8)
    hidden, aux = (torch.randn(length, width, generator=generator).bfloat16() for width in (8, 24))
    return Record(number, ids, mask, hidden, {AUX: aux})


def write(folder: Path, store_dtype: str = "same") -> Path:
    writer = ShardWriter(folder, store_dtype=store_dtype)
    for number in range(6):
        writer.add(record(number, 5 + number))
        if number % 2:
            writer.close_shard()
    return folder


@pytest.mark.parametrize(("store_dtype", "tolerance"), [("same", 0.0), ("int8", 0.05), ("float8", 0.3)])
def test_every_feature_comes_back(tmp_path: Path, store_dtype: str, tolerance: float) -> None:
    store = FeatureStore(write(tmp_path / "store", store_dtype))
    assert store.widths == {HIDDEN_STATE: 8, AUX: 24}
    for number, found in enumerate(store):
        expected = record(number, 5 + number)
        for name, tensor in expected.features().items():
            torch.testing.assert_close(found.features()[name], tensor, rtol=0, atol=tolerance)
        assert found.cut(3).more[AUX].shape == (3, 24)


def test_a_flipped_bit_in_any_feature_is_noticed(tmp_path: Path) -> None:
    folder = write(tmp_path / "store")
    path = folder / "shard-00000.safetensors"
    needle = record(0, 5).more[AUX].view(torch.uint8).numpy().tobytes()
    content = bytearray(path.read_bytes())
    content[content.find(needle) + 7] ^= 1
    path.write_bytes(content)
    with pytest.raises(WorkError, match="checksum of record 0"):
        FeatureStore(folder)[0]


def test_resharding_keeps_them(tmp_path: Path) -> None:
    folder = write(tmp_path / "store")
    before = check_store(folder)
    reshard(folder, tmp_path / "cut", 4)
    after = check_store(tmp_path / "cut")
    assert (before.content_digest, before.records) == (after.content_digest, 6)


def test_stores_of_other_features_do_not_mix(tmp_path: Path) -> None:
    write(tmp_path / "stores" / "a")
    writer = ShardWriter(tmp_path / "stores" / "b")
    whole = record(9, 5)
    writer.add(Record(9, whole.input_ids, whole.loss_mask, whole.hidden_state))
    writer.close_shard()
    with pytest.raises(ValueError, match="mixes stores"):
        FeatureStore(tmp_path / "stores")


def test_a_draft_reads_the_features_of_its_family(tmp_path: Path) -> None:
    """Shifted alike, whatever is read; the targets are the last hidden states."""
    whole = record(0, 5)
    example = shift(whole, AUX)
    assert torch.equal(example.features, whole.more[AUX][:-1])
    assert torch.equal(example.targets, whole.hidden_state[1:])
