"""Which files of a store are open: few, whatever is read, in threads and in forked children."""

import os
import pickle
import threading
from collections import deque
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from random import Random

import pytest

from eagle.errors import WorkError
from eagle.store import open_files
from eagle.store.damage import Damaged, Exhausted, Replaced, exhausted, memory_maps
from eagle.store.open_files import OPEN
from eagle.store.reader import FeatureStore
from eagle.store.shard import Shard, shard_name, write_shard
from tests.unit.test_features import equal, record

FILES = 60


@pytest.fixture
def store(tmp_path, monkeypatch):
    monkeypatch.setattr("os.fsync", lambda descriptor: None)
    for number in range(FILES):
        write_shard(tmp_path / shard_name(number), [record(2 * number, 5), record(2 * number + 1, 3)])
    OPEN.forget()
    return FeatureStore(tmp_path)


def test_opening_keeps_nothing_open(store):
    assert OPEN.alive == 0


def test_records_that_are_kept_keep_few_files_open(store, monkeypatch):
    monkeypatch.setattr(open_files, "most_open", lambda: 8)
    before = memory_maps()
    kept = list(store)
    assert len(kept) == 2 * FILES and OPEN.alive <= 3 * 8 + 1
    assert memory_maps() - before < FILES
    assert all(equal(item, record(item.conversation, len(item))) for item in kept)
    kept.clear()
    assert OPEN.alive <= 8


def test_writing_to_a_record_does_not_change_the_store(store):
    store[0].hidden_state.zero_()
    OPEN.forget()
    assert equal(store[0], record(0, 5))


def test_a_file_that_took_the_place_of_another_is_read(store):
    path = store.sources[0].path
    assert equal(store[0], record(0, 5))
    write_shard(path, [record(100, 7)])  # under another name first, then renamed
    assert equal(Shard(path).read(0), record(100, 7))


def test_a_file_cut_short_behind_our_back(store):
    path = store.sources[0].path
    os.truncate(path, path.stat().st_size - 8)
    with pytest.raises(Damaged, match="bytes and should have"):
        store[1]


@pytest.mark.parametrize("closed", [True, False])
def test_a_file_replaced_while_it_is_read(store, closed):
    """The number of a file that was deleted is given to the next one."""
    path, other = store.sources[0].path, store.sources[1].path
    if not closed:  # what is mapped is still the old file
        kept = store[0]
        other.replace(path)
        assert equal(store[0], kept)
        OPEN.forget()
    else:
        path.unlink()
        write_shard(path, [record(100, 5), record(101, 3)])
    for read in (lambda: store[1], store.supervised):
        with pytest.raises(Replaced, match="keep it, and run the same command again"):
            read()
    path.unlink()
    with pytest.raises(Replaced):
        store[0]
    assert not issubclass(Replaced, (Damaged, Exhausted)) and issubclass(Replaced, WorkError)


def test_a_replaced_file_is_told_to_other_processes_in_the_same_words():
    told = Replaced(Path("shard"))
    heard = pickle.loads(pickle.dumps(told))
    assert isinstance(heard, WorkError) and str(heard) == str(told)


def test_a_file_that_was_touched_or_numbered_anew_is_read(store):
    path = store.sources[0].path
    store.leave_out([0])
    os.utime(path, (1, 1))
    assert equal(store[0], record(1, 3))
    copy = path.with_name("copy")
    copy.write_bytes(path.read_bytes())
    copy.replace(path)
    OPEN.forget()
    assert equal(store[0], record(1, 3)) and store.supervised()[0] == Shard(path).supervised()[1]


def test_several_threads_read_at_once(store, monkeypatch):
    monkeypatch.setattr(open_files, "most_open", lambda: 2)

    def look(seed):
        kept = deque(maxlen=5)
        for index in Random(seed).choices(range(len(store)), k=400):
            kept.append(store[index])
            assert equal(kept[-1], record(kept[-1].conversation, len(kept[-1])))
        return True

    with ThreadPoolExecutor(4) as pool:
        assert all(pool.map(look, range(4)))
    assert OPEN.alive <= 3 * 2 + 4


def test_a_forked_child_has_a_lock_of_its_own(store):
    """Forked while a thread holds the lock: the child reads on."""
    kept, held, release = store[0], threading.Event(), threading.Event()

    def hold():
        with OPEN._lock:
            held.set()
            release.wait()

    thread = threading.Thread(target=hold)
    thread.start()
    held.wait()
    child = os.fork()
    if not child:
        code = 1
        try:
            code = 0 if OPEN.alive == 0 and equal(store[1], record(1, 3)) and equal(kept, record(0, 5)) else 2
        finally:
            os._exit(code)
    for _ in range(200):
        pid, status = os.waitpid(child, os.WNOHANG)
        if pid:
            break
        threading.Event().wait(0.05)
    else:
        os.kill(child, 9)
        os.waitpid(child, 0)
        status = -1
    release.set()
    thread.join()
    assert status == 0


@pytest.mark.parametrize(
    ("error", "says"),
    [
        (OSError(24, "Too many open files"), "ulimit -n"),
        (OSError(23, "Too many open files in system"), "fs.file-max"),
        (OSError(12, "Cannot allocate memory"), "no memory left"),
        (MemoryError(), "no memory left"),
        (RuntimeError("unable to mmap 8 bytes from file </d>: Cannot allocate memory (12)"), "no memory left"),
        (RuntimeError("DefaultCPUAllocator: can't allocate memory: you tried to allocate 8 bytes."), "no memory left"),
        (OSError(5, "Input/output error"), None),
        (RuntimeError("PytorchStreamReader failed reading zip archive"), None),
        (EOFError(), None),
    ],
)
def test_what_ran_out(error, says, tmp_path):
    found = exhausted(error, tmp_path)
    assert (says is None) == (found is None)
    if says:
        assert isinstance(found, Exhausted) and not isinstance(found, Damaged) and says in str(found)


def test_too_many_maps_are_named_with_their_limit(tmp_path, monkeypatch):
    monkeypatch.setattr("eagle.store.damage.max_memory_maps", lambda: memory_maps())
    assert "sysctl -w vm.max_map_count=" in str(exhausted(MemoryError(), tmp_path))


def test_a_disk_that_cannot_read_is_damage(store, monkeypatch):
    def broken(path, stamp):
        raise OSError(5, "Input/output error")

    monkeypatch.setattr(open_files, "_map", broken)
    with pytest.raises(Damaged, match="the disk cannot read it"):
        store[0]
