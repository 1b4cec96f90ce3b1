"""How a process watches the others of its group: what is silence, who has come to the end, whose words are the last."""

import select
import signal
import threading
import time

import pytest

from eagle.errors import FailedElsewhere, RequestError
from eagle.train import watch as watch_module
from eagle.train.watch import Ending, Keys, Watch


class Store:
    """Of one process. slow: seconds that adding to a counter of that name takes."""

    def __init__(self):
        self.values, self.lock, self.slow = {}, threading.Lock(), {}

    def set(self, name, value):
        self.values[name] = value

    def compare_set(self, name, expected, value):
        with self.lock:
            self.values.setdefault(name, value)

    def get(self, name):
        return self.values[name].encode()

    def add(self, name, number):
        time.sleep(self.slow.get(name, 0))
        with self.lock:
            self.values[name] = self.values.get(name, 0) + number
            return self.values[name]


@pytest.fixture
def group(monkeypatch):
    """Makes the watches of a group. They do not end this process: `exits` of each says with which code they would."""
    monkeypatch.setattr(watch_module, "TICK", 0.02)
    monkeypatch.setattr(watch_module, "GRACE", 0.1)
    monkeypatch.setattr(watch_module, "_wake_by_signals", lambda end: lambda: None)
    monkeypatch.setattr(Watch, "_report", lambda self, ending: None)

    def exit_(self, code):
        self.exits.append(code)
        self._closed = True

    monkeypatch.setattr(Watch, "_exit", exit_)
    made = []

    def make(size, store):
        watches = [Watch(rank, size, lambda: Keys(store, "")) for rank in range(size)]
        for watch in watches:
            watch.exits = []
        made.extend(watches)
        return watches

    yield make
    for watch in made:
        watch._closed = True
        for thread in watch._threads:
            if thread.ident:
                thread.join()


def signalled(watch, seconds):
    """Send it a signal with a handler again and again."""
    until = time.monotonic() + seconds
    while time.monotonic() < until and not watch._closed:
        watch._signalled.send(bytes([signal.SIGPROF]))
        while select.select([watch._signals], [], [], 0)[0] and not watch._closed:
            time.sleep(0.001)


def test_signals_are_no_silence(group, monkeypatch):
    """Though no beat comes between them; and they do not hide it either."""
    monkeypatch.setattr(watch_module, "TICK", 0.2)
    monkeypatch.setattr(watch_module, "LOST_AFTER", 4)
    watch, _ = group(2, Store())
    watch._threads[1].start()
    signalled(watch, 0.4)
    assert watch.ended is None
    signalled(watch, 1.0)
    assert watch.ended and watch.ended.lost and watch.exits == [1]


def test_a_process_is_done_when_it_has_said_so(group):
    """Also where that takes its store longer than an ending process has."""
    store = Store()
    watches = group(2, store)
    for watch in watches:
        watch.start()
    while not store.values.get("beat/1"):
        time.sleep(0.01)
    store.slow["beat/1"] = 0.25
    watches[1].leave()
    assert store.values["beat/1"] > watch_module._DONE
    watches[0].leave()
    assert [watch.exits for watch in watches] == [[], []]


def test_a_process_that_is_done_while_it_beats_says_so_all_the_same(group):
    """What it is saying then is a beat like others."""
    store = Store()
    watch = group(2, store)[1]
    add = store.add

    def add_and_be_done(name, number):
        if name == "beat/1":
            watch._leaving = True
        return add(name, number)

    store.add = add_and_be_done
    watch.start()
    while not store.values.get("beat/1"):
        time.sleep(0.01)
    watch.leave()
    assert store.values["beat/1"] > watch_module._DONE


def test_who_knows_why_has_the_last_words(group):
    """Not who only heard that another process failed, though it ends first."""
    watches = group(3, Store())
    for watch in watches:
        watch.start()
    elsewhere = [threading.Thread(target=watches[rank].fail, args=(FailedElsewhere("another one"),)) for rank in (0, 2)]
    for thread in elsewhere:
        thread.start()
    time.sleep(0.1)  # several ticks
    watches[1].fail(RequestError("the reason"))
    for thread in elsewhere:
        thread.join()
    for watch in watches:
        assert watch.ended and (watch.ended.rank, watch.ended.words) == (1, "the reason")
    assert [watch.exits for watch in watches] == [[2], [], [2]]


def test_a_launchers_sigterm_does_not_take_the_last_words_from_who_is_saying_them(group, monkeypatch):
    """It sends that as soon as another process has ended by the same error."""
    monkeypatch.setattr(watch_module, "GRACE", 2.0)
    watches = group(2, Store())
    for watch in watches:
        watch.start()
    failing = threading.Thread(target=watches[0].fail, args=(RequestError("the reason"),))
    failing.start()
    watches[0]._signalled.send(bytes([signal.SIGTERM]))
    failing.join()
    time.sleep(0.1)  # several ticks: the main thread is writing
    assert watches[0].exits == []


def test_the_second_of_a_machine_says_that_its_first_is_lost(monkeypatch, capfd):
    """Which says nothing any more. Of an error it has said all by itself."""
    monkeypatch.setenv("LOCAL_RANK", "1")
    watch = Watch(9, 16, lambda: Keys(Store(), ""))
    watch._report(Ending(8, watch.host, 1, "an error"))
    watch._report(Ending(7, watch.host, 1, "gone", lost=True))
    watch._report(Ending(8, "elsewhere", 1, "gone", lost=True))
    assert not capfd.readouterr().err
    watch._report(Ending(8, watch.host, 1, "gone", lost=True))
    assert "error: rank 8" in capfd.readouterr().err
