"""The one shift, the noise, and how an epoch is dealt out."""

from pathlib import Path

import numpy as np
import pytest
import torch

from eagle.drafts.alignment import collate, shift, supervised_positions
from eagle.errors import WorkError
from eagle.store.dtypes import STORE_DTYPES
from eagle.store.reader import FeatureStore
from eagle.store.record import Record, supervised_counts, token_key
from eagle.store.shard import write_shard
from eagle.target.features import HIDDEN_STATE
from eagle.train.dataset import (
    FeatureDataset,
    check_tokens,
    epoch_batches,
    keep_apart,
    micro_batches,
    split_store,
    validation_order,
)


def record(mask: list[int], number: int = 0) -> Record:
    length = len(mask)
    return Record(
        number,
        torch.arange(100, 100 + length, dtype=torch.int32),
        torch.tensor(mask, dtype=torch.uint8),
        torch.arange(length, dtype=torch.float32)[:, None].expand(length, 4).contiguous(),
    )


def test_alignment():
    """Position t reads token x[t+1] and feature f[t], and predicts f[t+1]."""
    example = shift(record([0, 0, 1, 1, 1]), HIDDEN_STATE)
    assert example.tokens.tolist() == [101, 102, 103, 104]
    assert example.features[:, 0].tolist() == [0, 1, 2, 3]
    assert example.targets[:, 0].tolist() == [1, 2, 3, 4]


@pytest.mark.parametrize(
    ("mask", "supervised"),
    [
        # The reply is x[2..4]. The target's own first step emits x[2]; the draft's first call, at the position before,
        # reads it and predicts x[3].
        ([0, 0, 1, 1, 1], [False, True, True, False]),
        # The end-of-turn token x[3] is predicted and not continued.
        ([0, 0, 1, 1, 0, 0], [False, True, False, False, False]),
        ([0, 1, 0, 1, 1, 1], [False, False, True, True, False]),
        ([1, 1, 1], [True, False]),
        ([0, 0, 0], [False, False]),
        ([0, 0, 1], [False, False]),
    ],
)
def test_supervised_exactly_where_both_tokens_are_the_assistants(mask, supervised):
    assert supervised_positions(torch.tensor(mask, dtype=torch.uint8)).tolist() == supervised
    by_definition = [t + 2 < len(mask) and mask[t + 1] == 1 and mask[t + 2] == 1 for t in range(len(mask) - 1)]
    assert supervised == by_definition


@pytest.mark.parametrize("max_len", [None, 1, 2, 3, 5, 99])
def test_counting_supervised_positions_without_the_features(max_len):
    """Of many records back to back, empty and short ones among them: as many as each has by itself."""
    random = np.random.RandomState(0)
    masks = [random.randint(0, 2, length) for length in [0, 1, 2, 3, *random.randint(0, 12, 60), 0]]
    offsets = np.cumsum([0, *map(len, masks)])
    cut = [torch.tensor(mask[:max_len]) for mask in masks]
    expected = [int(supervised_positions(mask).sum()) if len(mask) else 0 for mask in cut]
    assert supervised_counts(np.concatenate(masks), offsets, max_len).tolist() == expected
    assert (sum(expected) > 10) == (max_len not in (1, 2))


def random_record(mask: list[int], number: int, width: int = 32, name: str | None = None) -> Record:
    plain = record(mask, number)
    torch.manual_seed(number)
    features = [torch.randn(len(mask), size).bfloat16() for size in (width, 2 * width)]
    more = {name: features[1]} if name else {}
    return Record(number, plain.input_ids, plain.loss_mask, features[0], more)


MASKS = [[0, 1, 1, 1], [0, 0, 1, 1, 1, 1, 0], [0, 0, 0], [1, 1, 1, 0, 1, 1]]


@pytest.mark.parametrize("store_dtype", STORE_DTYPES)
@pytest.mark.parametrize("reads", [HIDDEN_STATE, "aux"])
def test_a_batch_is_its_examples(store_dtype, reads):
    """What is sent as it is stored and taken apart on the device is what every record says by itself."""
    stored = [random_record(mask, i, name="aux").stored(store_dtype) for i, mask in enumerate(MASKS)]
    examples = [shift(one.read(), reads) for one in stored]
    batch = collate(stored, reads).prepared(torch.float32)
    assert batch.tokens.shape == batch.supervised.shape == batch.features.shape[:2] == (4, 6)
    for row, example in enumerate(examples):
        length = len(example.tokens)
        assert torch.equal(batch.tokens[row, :length], example.tokens) and not batch.tokens[row, length:].any()
        assert torch.equal(batch.supervised[row, :length], example.supervised)
        assert torch.equal(batch.features[row, :length], example.features.float())
        assert not batch.supervised[row, length:].any() and not batch.features[row, length:].any()
    expected = torch.cat([example.targets[example.supervised] for example in examples])
    # Rotated back in a product of other rows: to the rounding of bfloat16.
    assert len(expected) == 7 and torch.allclose(batch.targets.float(), expected.float(), rtol=2**-7)
    numbers = torch.arange(4 * 6).view(1, 4, 6)
    assert batch.at_places(numbers).tolist() == [numbers[0][batch.supervised].tolist()]


def test_what_is_sent_is_the_features_once():
    """With ids and what is supervised, and one byte a value where the store has that."""
    sizes = {}
    for name in STORE_DTYPES:
        stored = [random_record([0] + [1] * 64, number, width=128).stored(name) for number in range(4)]
        sizes[name] = collate(stored, HIDDEN_STATE).nbytes / (4 * 64)
    index = 4 + 1 + 8  # at most: the place of a position is sent where it is supervised
    assert 256 < sizes["same"] <= 256 + index
    assert 128 + 4 < sizes["int8"] == sizes["float8"] <= 128 + 4 + index


def test_float8_can_be_unpacked_before_it_is_sent():
    for name in STORE_DTYPES:
        batch = collate([random_record(mask, i).stored(name) for i, mask in enumerate(MASKS)], HIDDEN_STATE)
        sent = batch.without_float8()
        assert sent.features[HIDDEN_STATE].values.dtype == (torch.int8 if name == "int8" else torch.bfloat16)
        assert torch.equal(sent.prepared(torch.float32).features, batch.prepared(torch.float32).features)


def test_a_batch_of_which_nothing_counts():
    batch = collate([record(mask).stored() for mask in MASKS], HIDDEN_STATE).unsupervised().prepared(torch.float32)
    assert not batch.supervised.any() and batch.targets.shape == (0, 4)
    assert batch.at_places(batch.supervised[None]).shape == (1, 0)


@pytest.fixture
def store(tmp_path):
    records = [record([0] + [1] * (3 + number % 7), number) for number in range(40)]
    write_shard(tmp_path / "shard-00000.safetensors", records)
    return FeatureStore(tmp_path)


def features_of(data: FeatureDataset, epoch: int, *indices: int) -> torch.Tensor:
    return data.batch(epoch, indices).prepared(torch.float32).features


def test_noise(store):
    quiet = FeatureDataset(store, np.arange(40), 100, HIDDEN_STATE)
    noisy = FeatureDataset(store, np.arange(40), 100, HIDDEN_STATE, noise=0.1, seed=3)
    difference = torch.cat([(features_of(noisy, 1, i) - features_of(quiet, 1, i))[0] for i in range(40)])
    assert difference.abs().max() <= 0.1 + 1e-6 and difference.abs().max() > 0.09
    assert abs(float(difference.mean())) < 0.01
    assert torch.equal(features_of(noisy, 1, 5), features_of(noisy, 1, 5))
    assert not torch.equal(features_of(noisy, 1, 5), features_of(noisy, 2, 5))
    targets = [data.batch(1, [5]).prepared(torch.float32).targets for data in (noisy, quiet)]
    assert torch.equal(*targets)


def test_noise_is_that_of_earlier_versions(store):
    """A run that one of them began goes on with the same."""
    data = FeatureDataset(store, np.arange(40), 100, HIDDEN_STATE, noise=0.1, seed=3)
    generator = torch.Generator().manual_seed(hash((3, 1, 5)) & (2**63 - 1))
    features = store[5].hidden_state[:-1]
    expected = features + 0.2 * (torch.rand(features.shape, generator=generator) - 0.5)
    assert torch.equal(features_of(data, 1, 5)[0], expected)


def test_noise_belongs_to_the_record_not_to_its_place(store):
    everything = FeatureDataset(store, np.arange(40), 100, HIDDEN_STATE, noise=0.1, seed=3)
    some = FeatureDataset(store, np.array([7, 9]), 100, HIDDEN_STATE, noise=0.1, seed=3)
    alone = features_of(everything, 0, 9)
    assert torch.equal(alone, features_of(some, 0, 1))
    among_others = features_of(some, 0, 0, 1)[1:]
    assert torch.equal(among_others[:, : alone.shape[1]], alone) and not among_others[:, alone.shape[1] :].any()


def test_cut_to_max_len(store):
    data = FeatureDataset(store, np.arange(40), 5, HIDDEN_STATE)
    assert max(data.lengths) == 5 and len(data.example(6).tokens) == 4 == data.batch(0, [6]).tokens.shape[1]


def test_tokens_outside_of_the_vocabulary_are_named(store):
    """On the host, by whatever is read: an embedding has no row for them."""
    data = FeatureDataset(store, np.arange(40), 100, HIDDEN_STATE, vocab_size=109)
    for read in (lambda: data.batch(0, [5, 6]), lambda: data.example(6)):
        with pytest.raises(WorkError, match=r"Conversation 6 holds the token 109, .* 109, from 0 on: .*another model"):
            read()
    cut = FeatureDataset(store, np.arange(40), 9, HIDDEN_STATE, vocab_size=109)
    assert cut.batch(0, [5, 6]).tokens.max() == 108
    negative = record([0, 1, 1], 3)
    negative.input_ids[1] = -1
    with pytest.raises(WorkError, match="Conversation 3 holds the token -1, "):
        check_tokens(negative.stored(), 109)


@pytest.mark.parametrize(("ratio", "held_out"), [(0.05, 2), (0.5, 20), (0.001, 1), (0.0, 0), (0.99, 39)])
def test_split(store, ratio, held_out):
    train, validation = split_store(store, ratio, seed=1)
    assert len(validation) == held_out
    assert sorted([*train, *validation]) == list(range(40))
    again = split_store(store, ratio, seed=1)
    assert (again[0] == train).all() and (again[1] == validation).all()


def test_split_of_what_is_usable(store):
    """As if the others were not there."""
    usable = np.array([1, 4, 5, 9, 20, 21, 30, 39])
    train, validation = split_store(store, 0.25, 1, usable)
    assert sorted([*train, *validation]) == usable.tolist() and len(validation) == 2
    everything = split_store(store, 0.25, 1, np.arange(40))
    assert all((a == b).all() for a, b in zip(everything, split_store(store, 0.25, 1), strict=True))


def repeating(folder: Path, dumps: bool) -> FeatureStore:
    """Sixty conversations: 35 rows of random tokens, and 25 of them once more, in any order."""
    random = np.random.RandomState(0)
    rows = [random.randint(0, 9, random.randint(6, 10)) for _ in range(35)]
    rows += rows[:25]
    records = []
    for number, place in enumerate(random.permutation(60)):
        ids, mask = torch.from_numpy(rows[place]).int(), torch.ones(len(rows[place]), dtype=torch.uint8)
        records.append(Record(number, ids, mask, torch.randn(len(ids), 4)))
        content = {"input_ids": ids.long(), "loss_mask": mask, "hidden_state": records[-1].hidden_state}
        if dumps:
            torch.save(content, folder / f"data_{number}.ckpt")
    for at in range(0, 0 if dumps else 60, 20):
        write_shard(folder / f"shard-0000{at // 20}.safetensors", records[at : at + 20])
    return FeatureStore(folder)


@pytest.mark.parametrize("dumps", [False, True])
@pytest.mark.parametrize("max_len", [5, 100])
def test_what_is_validated_is_not_trained_under_another_number(tmp_path, dumps, max_len):
    """Whatever is held out stays held out; and the records that are left keep their order."""
    store = repeating(tmp_path, dumps)
    store.leave_out([3, 40])
    train, held_out = split_store(store, 0.2, 1)
    rows = {index: tuple(store[index].input_ids[:max_len].tolist()) for index in range(len(store))}
    validated = {rows[index] for index in held_out}
    expected = [index for index in train.tolist() if rows[index] not in validated]
    left = len(train) - len(expected)
    assert 3 < left < len(train) / 2
    kept, (note,) = keep_apart(store, train, held_out, max_len)
    assert kept.tolist() == expected
    assert (
        note == f"{left} of {len(train)} training records have the same tokens as a validation record and are left out"
    )
    everything, (note,) = keep_apart(store, train, held_out, max_len, leave_out=False)
    assert everything is train and note.endswith("the run began with them and goes on with them")
    assert keep_apart(store, kept, held_out, max_len) == (kept, [])
    assert keep_apart(store, train, held_out[:0], max_len) == (train, [])


def test_a_file_of_one_conversation_is_still_trained_on(store):
    """As somebody makes who tries it out: all of it is what is validated."""
    train, held_out = np.array([0, 7, 14]), np.array([21])
    kept, (note,) = keep_apart(store, train, held_out, 100)
    assert kept is train and "3 of 3 training records" in note and "says nothing of other conversations" in note


def test_a_key_of_tokens_is_the_same_in_every_process():
    rows = [np.arange(4, dtype=np.int32), np.arange(4), np.arange(8, dtype=np.int32)[:4], np.arange(8)[::2] // 2]
    assert {token_key(row) for row in rows} == {-387804988308644362}
    assert token_key(np.arange(3)) != token_key(rows[0]) and isinstance(token_key(np.arange(0)), int)


LENGTHS = np.random.RandomState(0).randint(5, 500, 333)


@pytest.mark.parametrize("size", [1, 4, 7, 64, 1000])
def test_an_epoch_takes_every_record_once(size):
    batches = epoch_batches(LENGTHS, size, seed=1, epoch=0)
    assert sorted(np.concatenate(batches)) == list(range(333))
    assert max(map(len, batches)) <= size
    other = epoch_batches(LENGTHS, size, seed=1, epoch=1)
    assert [list(b) for b in batches] != [list(b) for b in other]


def test_batches_pad_little():
    padded = sum(len(b) * LENGTHS[b].max() for b in epoch_batches(LENGTHS, 8, seed=1, epoch=0))
    assert padded < 1.25 * LENGTHS.sum()
    unsorted = sum(8 * LENGTHS[at : at + 8].max() for at in range(0, 333, 8))
    assert padded < 0.8 * unsorted


@pytest.mark.parametrize(("processes", "accumulation"), [(1, 1), (2, 1), (1, 3), (4, 2)])
@pytest.mark.parametrize("records", [1, 5, 8, 23, 24])
def test_micro_batches_deal_out_a_global_batch(processes, accumulation, records):
    size = 3
    batch = np.arange(100, 100 + min(records, size * processes * accumulation))
    dealt = [micro_batches(batch, size, rank, processes, accumulation) for rank in range(processes)]
    assert all(len(own) == accumulation for own in dealt)
    assert sorted(np.concatenate([piece for own in dealt for piece in own])) == sorted(batch)
    assert max(len(piece) for own in dealt for piece in own) <= size


def test_validation_pads_little_and_takes_every_record_once():
    pieces = validation_order(LENGTHS, 8)
    assert sorted(np.concatenate(pieces)) == list(range(333)) and max(map(len, pieces)) == 8
    assert sum(len(piece) * LENGTHS[piece].max() for piece in pieces) < 1.03 * LENGTHS.sum()
    assert LENGTHS[pieces[0]].max() == LENGTHS.max()
