"""Features from a card into host memory: the order of streams and events, the buffers, and cards that overlap.

The card is pretended: its tensors are the CPU's, and what is asked of its streams is written down.
"""

import json
import threading
import time
from contextlib import contextmanager

import numpy as np
import pytest
import torch

from eagle import streams
from eagle.data.loss_mask import Encoded
from eagle.generate.collector import Collector, Item, NotFinite, ahead_of
from eagle.generate.fetch import HostCopies
from eagle.generate.progress import Progress
from eagle.store.shard import Shard, shard_paths
from eagle.store.writer import ShardWriter
from eagle.target.features import HIDDEN_STATE


class Pretended:
    """``torch.cuda`` as far as it is used; `log` has what was asked of it in order."""

    def __init__(self):
        self.log, self.current, backend = [], "compute", self

        class Stream:
            def __init__(self, place):
                self.name = f"copy {place}"

            def wait_event(self, event):
                backend.log.append(("wait", self.name, event.of))

        class Event:
            of = None

            def record(self, stream):
                self.of = getattr(stream, "name", stream)
                backend.log.append(("record", self.of))

            def synchronize(self):
                backend.log.append(("synchronize", self.of))

        self.Stream, self.Event = Stream, Event

    def current_stream(self, place):
        return self.current

    @contextmanager
    def stream(self, stream):
        before, self.current = self.current, stream.name
        yield
        self.current = before


class OnCard(torch.Tensor):
    """A tensor that says where it is and writes down who uses it."""

    backend: Pretended
    place = torch.device("cuda", 0)

    @property
    def device(self):
        return self.place

    def record_stream(self, stream):
        self.backend.log.append(("record_stream", stream.name))

    @classmethod
    def __torch_function__(cls, function, types, args=(), kwargs=None):
        found = super().__torch_function__(function, types, args, kwargs or {})
        if function in (torch.Tensor.isfinite, torch.Tensor.copy_):
            cls.backend.log.append((function.__name__, cls.backend.current))
        return found


def on_card(backend, tensor, place="cuda:0"):
    kind = type("OnCard", (OnCard,), {"backend": backend, "place": torch.device(place)})
    return tensor.as_subclass(kind)


@pytest.fixture
def backend(monkeypatch):
    made = Pretended()
    monkeypatch.setattr(streams, "pinned", lambda tensor, kind: tensor)
    monkeypatch.setattr(streams, "make_current", lambda place: made.log.append(("current", str(place))))
    return made


def test_a_copy_waits_for_the_forward_pass_and_the_reader_for_the_copy(backend):
    values = torch.randn(2, 3, 4)
    copy = HostCopies(2, backend).start({HIDDEN_STATE: on_card(backend, values)})
    stream = "copy cuda:0"
    assert backend.log == [
        ("record", "compute"), ("wait", stream, "compute"),
        ("isfinite", stream),
        ("copy_", stream), ("record_stream", stream),
        ("copy_", stream), ("record_stream", stream),
        ("record", stream),
    ]  # fmt: skip
    backend.log.clear()
    with copy as (features, finite):
        assert backend.log[:2] == [("current", "cuda:0"), ("synchronize", stream)]
        assert torch.equal(features[HIDDEN_STATE], values) and finite.all()
        assert type(features[HIDDEN_STATE]) is torch.Tensor


def test_features_on_several_cards_have_a_stream_each(backend):
    one, two = torch.randn(1, 3, 4), torch.randn(1, 3, 2, dtype=torch.float16)
    two[0, 1, 0] = torch.inf
    placed = {HIDDEN_STATE: on_card(backend, one, "cuda:3"), "early": on_card(backend, two, "cuda:1")}
    with HostCopies(1, backend).start(placed) as (features, finite):
        assert torch.equal(features[HIDDEN_STATE], one) and torch.equal(features["early"], two)
        assert finite.tolist() == [[True, False, True]]
    for place in ("cuda:3", "cuda:1"):
        stream = f"copy {place}"
        assert backend.log.count(("record_stream", stream)) == 2 == backend.log.count(("copy_", stream))
        last_copy = max(i for i, entry in enumerate(backend.log) if entry == ("copy_", stream))
        assert last_copy < backend.log.index(("record", stream)) < backend.log.index(("synchronize", stream))


def test_buffers_are_bounded_and_used_again_only_when_they_were_read(backend):
    copies = HostCopies(2, backend)
    batches = [torch.full((1, 5, 8), float(number)) for number in range(3)]
    first, second = (copies.start({"x": on_card(backend, batch)}) for batch in batches[:2])
    third = []
    starter = threading.Thread(target=lambda: third.append(copies.start({"x": on_card(backend, batches[2])})))
    starter.start()
    with first as (features, _):
        starter.join(0.1)
        assert starter.is_alive() and not third, "no buffer is free"
        assert torch.equal(features["x"], batches[0])
        memory = features["x"].data_ptr()
    starter.join(10)
    with third[0] as (features, _):
        assert features["x"].data_ptr() == memory and torch.equal(features["x"], batches[2])
    with second as (features, _):
        assert features["x"].data_ptr() != memory and torch.equal(features["x"], batches[1])


def items_of(features, start):
    rows, length = features.shape[:2]
    return [
        Item(start + row, Encoded(np.arange(length, dtype=np.int32), np.ones(length, np.uint8))) for row in range(rows)
    ]


def collector_of(folder, backend, cards=1):
    made = Collector(ShardWriter(folder, shard_bytes=2000, background=True), Progress(), "float32", cards=cards)
    made._copies._backend = backend
    return made


def test_what_is_stored_is_what_was_computed_though_buffers_are_used_again(backend, tmp_path):
    batches = [torch.randn(2, 7, 8) for _ in range(25)]
    collector = collector_of(tmp_path, backend)
    for number, batch in enumerate(batches):
        collector.add({HIDDEN_STATE: on_card(backend, batch)}, items_of(batch, 2 * number))
    collector.close()
    records = [record for path in shard_paths(tmp_path) for record in map(Shard(path).read, range(len(Shard(path))))]
    assert len(shard_paths(tmp_path)) > 3 and len(records) == 50
    for record in records:
        assert torch.equal(record.hidden_state, batches[record.conversation // 2][record.conversation % 2])


def test_not_finite_ends_the_work_whatever_comes_behind_it(backend, tmp_path):
    collector = collector_of(tmp_path, backend)
    batch = torch.randn(1, 7, 8)
    with pytest.raises(NotFinite, match="conversation 3 are not finite"):
        for number in range(20):
            broken = batch.clone().fill_(torch.nan) if number == 3 else batch
            collector.add({HIDDEN_STATE: on_card(backend, broken)}, items_of(batch, number))


@pytest.mark.parametrize("error", [NotFinite, MemoryError])
def test_what_is_queued_behind_a_failure_is_not_stored(backend, tmp_path, error):
    """A rerun goes on where the last shard ends: one with later batches would leave out the one that failed."""
    collector, hold = collector_of(tmp_path, backend), threading.Event()
    batch, add_record = torch.randn(2, 40, 8), collector.writer.add  # each fills a shard

    def add_where_memory_suffices(record):
        if error is MemoryError and record.conversation == 102:
            raise MemoryError("for the clone")
        add_record(record)

    collector.writer.add = add_where_memory_suffices

    def add(start):
        broken = batch.clone()
        broken[0, 3] = torch.nan if error is NotFinite and start == 102 else 0
        collector.add({HIDDEN_STATE: on_card(backend, broken)}, items_of(broken, start))

    add(100)
    collector._pending[0].result()
    collector._pool.submit(hold.wait, 10)
    add(102)
    threading.Timer(0.1, hold.set).start()
    with pytest.raises(error):
        add(104)
        add(106)
    with pytest.raises(error):
        collector.close()
    collector._pool.shutdown()  # as the interpreter does at its end: what is queued is worked off
    collector.writer.wait()
    held = [Shard(path).conversations.tolist() for path in shard_paths(tmp_path)]
    assert held == [[100, 101]]
    assert Progress.from_json(json.loads(Shard(shard_paths(tmp_path)[-1]).progress)).records == 2
    assert collector._copies._free.qsize() == ahead_of(1) + 1


@pytest.mark.parametrize("cards", [1, 2, 8])
def test_as_many_batches_are_on_their_way_as_there_are_cards_and_one_more(backend, tmp_path, cards):
    """Counted while nothing is fetched: the one that is being started among them."""
    collector, batch, hold = collector_of(tmp_path, backend, cards), torch.randn(1, 3, 4), threading.Event()
    fetch = collector._fetch
    collector._fetch = lambda *args: (hold.wait(10), fetch(*args))
    started = []

    def start():
        for number in range(cards + 4):
            started.append(number)
            collector.add({HIDDEN_STATE: on_card(backend, batch)}, items_of(batch, number))

    thread = threading.Thread(target=start)
    thread.start()
    expected, deadline = ahead_of(cards) + 1, time.monotonic() + 10
    assert expected == max(3, cards + 1)
    while len(started) < expected and time.monotonic() < deadline:
        time.sleep(0.01)
    time.sleep(0.1)
    assert len(started) == expected
    hold.set()
    thread.join(10)
    collector.close()
    assert collector.progress.records == cards + 4
