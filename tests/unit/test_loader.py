"""Reading ahead in threads, and sending one ahead of what is used."""

from __future__ import annotations

import threading
import time
from contextlib import contextmanager

import numpy as np
import pytest
import torch

from eagle import streams
from eagle.drafts.alignment import collate
from eagle.errors import WorkError
from eagle.store.dtypes import STORE_DTYPES
from eagle.store.reader import FeatureStore
from eagle.store.record import Record
from eagle.store.shard import write_shard
from eagle.target.features import HIDDEN_STATE
from eagle.train import loader as loader_module
from eagle.train.dataset import FeatureDataset
from eagle.train.loader import AHEAD, Key, Loader

CPU = torch.device("cpu")


def make_record(number: int, length: int = 6) -> Record:
    ids = torch.full((length,), number, dtype=torch.int32)
    return Record(number, ids, torch.ones(length, dtype=torch.uint8), torch.full((length, 4), float(number)))


@pytest.fixture
def data(tmp_path):
    write_shard(tmp_path / "shard-00000.safetensors", [make_record(number, 4 + number % 5) for number in range(24)])
    return FeatureDataset(FeatureStore(tmp_path), np.arange(24), 100, HIDDEN_STATE)


KEYS = [Key(0, (number, number + 1), is_empty=number == 4) for number in range(0, 24, 2)]


@pytest.mark.parametrize("threads", [0, 1, 3])
def test_batches_come_in_their_order_whoever_reads_them(data, threads):
    batch = data.batch

    def slowly(epoch, indices):
        time.sleep(0.02 if indices[0] % 4 == 0 else 0)
        return batch(epoch, indices)

    data.batch = slowly
    found = []
    with Loader(data, KEYS, CPU, torch.float32, threads) as loader:
        for group in loader.groups(5):
            assert len(group) == 5 or group[0].conversations == (20, 21)
            for stored, ready in zip(group, loader.on_device(group), strict=True):
                assert ready.features.dtype == torch.float32 and ready.tokens[0, 0] == stored.conversations[0]
                found.append(stored.conversations)
                assert bool(ready.supervised.any()) == (stored.conversations != (4, 5))
    assert found == [key.indices for key in KEYS]


@pytest.mark.parametrize("threads", [1, 2])
def test_threads_read_so_far_ahead_and_no_farther(data, threads):
    read, batch = [], data.batch
    data.batch = lambda epoch, indices: read.append(indices) or batch(epoch, indices)
    with Loader(data, KEYS, CPU, torch.float32, threads) as loader:
        groups = loader.groups(1)
        next(groups)
        deadline = time.monotonic() + 20
        while len(read) < 1 + AHEAD * threads and time.monotonic() < deadline:
            time.sleep(0.01)
        time.sleep(0.1)
        assert len(read) == 1 + AHEAD * threads


def test_what_goes_wrong_in_a_thread_is_the_callers(data):
    batch = data.batch

    def breaks(epoch, indices):
        if indices[0] == 8:
            raise WorkError("record 8 is damaged")
        return batch(epoch, indices)

    data.batch = breaks
    taken = 0
    with pytest.raises(WorkError, match=r"^record 8 is damaged$"), Loader(data, KEYS, CPU, torch.float32, 2) as loader:
        for group in loader.groups(1):
            taken += len(list(loader.on_device(group)))
    assert taken == 4


def test_leaving_early_leaves_no_thread_at_work(data):
    before = threading.active_count()
    with Loader(data, KEYS, CPU, torch.float32, 3) as loader:
        next(loader.groups(1))
    deadline = time.monotonic() + 20
    while threading.active_count() > before and time.monotonic() < deadline:
        time.sleep(0.01)
    assert threading.active_count() <= before  # one of an earlier test may end, too


class FakeCard:
    """Stands for an accelerator: tensors stay on the CPU, what is asked of its streams is written down."""

    def __init__(self, monkeypatch) -> None:
        self.said: list[tuple[str, int]] = []
        self.copying, self.pinned = False, []
        monkeypatch.setattr(streams, "new_stream", lambda where: self)
        monkeypatch.setattr(streams, "on_stream", self.on_stream)
        monkeypatch.setattr(streams, "pinned", lambda tensor, kind: self.pin(tensor))
        monkeypatch.setattr(streams, "wait_for", lambda event, tensors: self.said.append(("waited", event)))
        monkeypatch.setattr(loader_module.StoredBatch, "to", lambda batch, where: self.copy(batch))

    def pin(self, tensor):
        self.pinned.append(tensor.clone())
        return self.pinned[-1]

    @contextmanager
    def on_stream(self, stream):
        assert stream is self
        self.copying = True
        yield
        self.copying = False

    def copy(self, batch):
        assert self.copying, "a copy on the stream that computes waits for what computes"
        assert any(batch.tokens is tensor for tensor in self.pinned), "from memory that is not page-locked"
        self.said.append(("sent", batch.conversations[0]))
        self.latest = batch.conversations[0]
        return batch

    def record_event(self) -> int:
        assert self.copying
        return self.latest


@pytest.mark.parametrize(("threads", "size"), [(0, 1), (0, 3), (2, 1), (2, 3)])
def test_the_next_batch_is_sent_before_one_is_used(data, monkeypatch, threads, size):
    card = FakeCard(monkeypatch)
    with Loader(data, KEYS, CPU, torch.float32, threads) as loader:
        for group in loader.groups(size):
            if threads:  # until what comes next has been read
                waiting = list(loader._waiting)
                for future in waiting:
                    future.result()
            for stored, _ in zip(group, loader.on_device(group), strict=True):
                card.said.append(("used", stored.conversations[0]))
    place = {said: number for number, said in enumerate(card.said)}
    assert len(place) == len(card.said) == 3 * len(KEYS), "each is sent, waited for and used once"
    for key, following in zip(KEYS, [*KEYS[1:], None], strict=True):
        sent, waited, used = (place[what, key.indices[0]] for what in ("sent", "waited", "used"))
        assert sent < waited < used
        ends_group = (KEYS.index(key) + 1) % size == 0
        if following and not (ends_group and not threads):
            assert place["sent", following.indices[0]] < used


class HostTensor:
    """Stands for a tensor on the host, page-locked or not, and writes down whether a copy of it is waited for."""

    def __init__(self, *, locked: bool, lockable: bool = True) -> None:
        self.locked, self.lockable, self.waited = locked, lockable, []

    def is_pinned(self, *kind):
        return self.locked

    def pin_memory(self, *kind):
        if not self.lockable:
            raise RuntimeError("no page-locked memory is left")
        return HostTensor(locked=True)

    def to(self, device, non_blocking=False):
        self.waited.append(not non_blocking)
        return self


@pytest.mark.parametrize("kind", ["cuda", "npu"])
def test_a_copy_from_memory_that_is_not_page_locked_is_waited_for(data, kind):
    """That may be somebody else's before a card has read it."""

    class Card:
        type = kind

    batch = data.batch(0, (0, 1))
    for locked in (True, False):
        tensors = [HostTensor(locked=locked) for _ in batch.tensors()]
        batch.with_tensors(tensors).to(Card())
        assert [tensor.waited for tensor in tensors] == [[not locked]] * len(tensors)
    assert streams.to_card(HostTensor(locked=False), Card()).waited == [False]
    assert streams.to_card(HostTensor(locked=False, lockable=False), Card()).waited == [True]


@pytest.mark.parametrize("store_dtype", STORE_DTYPES)
def test_preparing_asks_nothing_of_the_device(store_dtype):
    """On a device whose tensors have no values, whatever waits for one fails."""
    stored = [make_record(number, 5 + number).stored(store_dtype) for number in range(3)]
    batch = collate(stored, HIDDEN_STATE).to(torch.device("meta")).prepared(torch.bfloat16)
    assert batch.features.shape == (3, 6, 4) and batch.targets.shape == (3 + 4 + 5, 4)
    assert batch.at_places(batch.supervised[None]).shape == (1, 12) and batch.features.dtype == torch.bfloat16
