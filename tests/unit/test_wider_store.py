"""A store whose records hold more features than the last hidden state, as other draft families need them."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from eagle.drafts.alignment import collate, shift
from eagle.errors import WorkError
from eagle.store.dtypes import STORE_DTYPES
from eagle.store.reader import FeatureStore
from eagle.store.record import Record
from eagle.store.reshard import reshard
from eagle.store.verify import check_store
from eagle.store.writer import ShardWriter
from eagle.target.features import HIDDEN_STATE, aux_name, holder_of
from eagle.train.dataset import FeatureDataset

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


# ---- some of the layers that a store holds


HELD = (0, 2, 5, 7, 9)


def of_layers(number: int, layers: tuple[int, ...]) -> Record:
    """The same conversation whatever the layers; a later layer's states are many times larger."""
    whole = record(number, 5 + number)
    states = {
        layer: (4**layer * torch.randn(len(whole), 64, generator=torch.Generator().manual_seed(100 * number + layer)))
        for layer in HELD
    }
    aux = torch.cat([states[layer] for layer in layers], -1).bfloat16()
    return Record(number, whole.input_ids, whole.loss_mask, aux[:, :64].clone(), {aux_name(layers): aux})


def store_of(folder: Path, layers: tuple[int, ...], store_dtype: str) -> FeatureStore:
    writer = ShardWriter(folder, store_dtype=store_dtype)
    for number in range(4):
        whole = of_layers(number, layers)
        last = torch.arange(len(whole) * 64).view(-1, 64).bfloat16()
        writer.add(Record(number, whole.input_ids, whole.loss_mask, last, whole.more))
    writer.close_shard()
    return FeatureStore(folder)


@pytest.mark.parametrize("layers", [(2, 5, 9), (0, 7), (5,), HELD], ids=str)
@pytest.mark.parametrize("store_dtype", STORE_DTYPES)
def test_some_of_its_layers_are_what_a_store_of_these_alone_holds(
    tmp_path: Path, store_dtype: str, layers: tuple[int, ...]
) -> None:
    """To the bit, scales included, in what is sent to the device and in what the start sees."""
    more, alone = (store_of(tmp_path / name, of, store_dtype) for name, of in (("more", HELD), ("alone", layers)))
    name, everything = aux_name(layers), torch.arange(4).numpy()
    for ours, theirs in zip(more.stored(range(4)), alone.stored(range(4)), strict=True):
        found, expected = ours.feature(name), theirs.features[name]
        for a, b in zip(found.tensors(), expected.tensors(), strict=True):
            assert a.dtype == b.dtype and torch.equal(a.view(torch.uint8), b.contiguous().view(torch.uint8))
        assert found.dtype == expected.dtype
        assert torch.equal(ours.read([name]).more[name], theirs.read().more[name])
    datasets = [FeatureDataset(store, everything, 7, name, noise=0.1) for store in (more, alone)]
    batches = [data.batch(0, range(4)) for data in datasets]
    assert [batch.nbytes for batch in batches] == [batches[1].nbytes] * 2, "no more is sent"
    ours, theirs = (batch.prepared(torch.float32) for batch in batches)
    assert torch.equal(ours.features, theirs.features) and torch.equal(ours.targets, theirs.targets)
    for index in range(4):
        ours, theirs = (data.example(index) for data in datasets)
        assert torch.equal(ours.features, theirs.features) and torch.equal(ours.targets, theirs.targets)
    whole = of_layers(1, HELD)
    assert torch.equal(whole.feature(name), of_layers(1, layers).more[name])


def test_layers_are_found_by_their_number() -> None:
    held = [HIDDEN_STATE, "aux_0_2_5_10"]
    assert holder_of("aux_2_10", held) == holder_of("aux_0_2_5_10", held) == "aux_0_2_5_10"
    assert holder_of(HIDDEN_STATE, held) == HIDDEN_STATE
    assert holder_of("aux_1", held) is holder_of("aux_2_3", held) is holder_of("other", held) is None
    with pytest.raises(AssertionError, match="has no aux_0_1"):
        of_layers(0, HELD).feature("aux_0_1")
    assert collate([of_layers(1, HELD).stored()], "aux_7_9").features["aux_7_9"].values.shape == (1, 5, 128)
