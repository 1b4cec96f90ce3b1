"""Stores of as many files as real jobs have, and what it means to run out of maps, open files or memory."""

from __future__ import annotations

import json
import os
import re
import shutil
from pathlib import Path

import pytest
import torch

from eagle.drafts.saved import resolve_pointer
from eagle.store.reader import FeatureStore
from eagle.store.record import Record
from eagle.store.shard import shard_name, shard_paths, write_shard
from tests.e2e.commands import command

#: As many as a job of a million conversations makes; both are more than half of what vm.max_map_count allows.
DUMPS, SHARDS = 70_000, 35_000
#: A file system allows a file so many names at least (ext4: 65,000).
NAMES = 2_000

#: Opens a store and reads a part of it at random; says how many records, how many maps it holds in the end, and the sum
#: of what it read. It keeps the last records, as training does.
READER = """
import collections, random, resource, sys
from eagle.entry import run
from eagle.store.damage import memory_maps
from eagle.store.reader import FeatureStore

def main():
    folder, reads, files = sys.argv[1], int(sys.argv[2]), int(sys.argv[3])
    if files:
        resource.setrlimit(resource.RLIMIT_NOFILE, (files, files))
    before = memory_maps()
    store = FeatureStore(folder)
    kept = collections.deque(maxlen=2000)
    order = random.Random(0).sample(range(len(store)), min(reads, len(store)))
    for index in order:
        kept.append(store[index])
        assert kept[-1].hidden_state[0, 0] == kept[-1].input_ids[0]
    assert int(store.supervised().min()) == int(store.supervised().max()) == 2
    print(f"{len(store)} records, {memory_maps() - before} maps")
    return 0

sys.exit(run(main))
"""


def tiny(number: int) -> Record:
    """Its tokens and features say which record it is."""
    ids = torch.full((4,), number % 128, dtype=torch.int32)
    mask = torch.ones(4, dtype=torch.uint8)
    return Record(number, ids, mask, torch.full((4, 4), number % 128, dtype=torch.bfloat16))


def many_dumps(folder: Path, count: int) -> Path:
    """Dumps of the classic layout; those that hold the same are names of one file."""
    folder.mkdir()
    for number in range(count):
        path = folder / f"data_{number}.ckpt"
        if number >= 128 and number % (128 * NAMES) >= 128:
            os.link(folder / f"data_{number - 128}.ckpt", path)
            continue
        item = tiny(number)
        content = {name: getattr(item, name) for name in ("input_ids", "loss_mask", "hidden_state")}
        torch.save(content, path)
    return folder


def many_shards(folder: Path, count: int, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder for every thousand shards, whose conversations are of a data file of their own."""
    monkeypatch.setattr("os.fsync", lambda descriptor: None)
    for start in range(0, count, 1000):
        part = folder / str(start // 1000)
        part.mkdir(parents=True)
        for number in range(min(1000, count - start)):
            if start:
                os.link(folder / "0" / shard_name(number), part / shard_name(number))
            else:
                write_shard(part / shard_name(number), [tiny(number)])
    return folder


def maps_held(folder: Path, records: int, *, reads: int, files: int = 0) -> int:
    """The maps of a process that has opened a store of so many records and read some; files: what `ulimit -n` says."""
    said = command("-c", READER, folder, reads, files).out
    found = re.fullmatch(r"(\d+) records, (-?\d+) maps\n", said)
    assert found and int(found[1]) == records, said
    return int(found[2])


@pytest.mark.long
def test_as_many_dumps_as_real_jobs_have(tmp_path: Path) -> None:
    folder = many_dumps(tmp_path / "dumps", DUMPS)
    assert maps_held(folder, DUMPS, reads=3000) < 1000


@pytest.mark.long
def test_as_many_shards_as_real_jobs_have(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Opened, read at random, and each verified."""
    folder = many_shards(tmp_path / "shards", SHARDS, monkeypatch)
    assert maps_held(folder, SHARDS, reads=5000) < 2000
    said = command("-m", "eagle.store.verify", folder, "--json").out
    assert f'"records": {SHARDS}' in said and '"damage": []' in said


@pytest.fixture(scope="module", params=["dumps", "shards"])
def few(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A store of 2,000 files, more than the limits under which it is read."""
    folder = tmp_path_factory.mktemp("few") / request.param
    if request.param == "dumps":
        return many_dumps(folder, 2000)
    with pytest.MonkeyPatch.context() as monkeypatch:
        return many_shards(folder, 2000, monkeypatch)


def test_read_with_few_open_files(few: Path) -> None:
    """Every record of it, and all of them kept: none keeps a file open, or they would be too many."""
    assert maps_held(few, 2000, reads=2000, files=64) < 300


def test_verified_with_few_open_files(few: Path) -> None:
    code = "import resource, sys; resource.setrlimit(resource.RLIMIT_NOFILE, (96, 96)); "
    code += "from eagle.store.verify import main; sys.exit(main([sys.argv[1], '--json']))"
    said = command("-c", code, few).out
    assert '"records": 2000' in said and '"damage": []' in said


#: In a child each: takes what there is of something, then opens the folder in some way. Says what came of it.
STARVED = """
import json, mmap, os, resource, sys, tempfile
from pathlib import Path
from eagle.entry import run
from eagle.store import reshard, verify
from eagle.store.reader import FeatureStore

held, folder = [], Path(sys.argv[1])

def open_files():
    resource.setrlimit(resource.RLIMIT_NOFILE, (256, 256))
    try:
        while True:
            held.append(os.open(os.devnull, os.O_RDONLY))
    except OSError:
        for descriptor in held[: int(sys.argv[2])]:
            os.close(descriptor)

def memory():
    size = int(Path("/proc/self/statm").read_text().split()[0]) * resource.getpagesize() + (4 << 20)
    resource.setrlimit(resource.RLIMIT_AS, (size, size))

def maps():
    try:
        while True:
            # Neighbours of one kind would become one map.
            held.append(mmap.mmap(-1, 4096, prot=mmap.PROT_READ | (len(held) % 2 and mmap.PROT_WRITE)))
    except OSError:
        pass

ways = {
    "open": lambda: len(FeatureStore(folder)) * 0,
    "read": lambda: len(FeatureStore(folder)[1]) * 0,
    "verify": lambda: verify.main([str(folder)]),
    "skip": lambda: len(verify.skip_damaged(folder, "--tmpdir")) * 0,
    "reshard": lambda: len(reshard.preview(folder, folder.with_name("new"), 2, leave_out_damaged=True)) * 0,
}
run(ways["open"])  # everything is imported, and has its memory
found = []
for starve in (open_files, memory, maps):
    for name, way in ways.items():
        with tempfile.TemporaryFile("w+") as said:
            child = os.fork()
            if not child:
                os.dup2(said.fileno(), 2)
                starve()
                os._exit(run(way))
            code = os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
            said.seek(0)
            found.append([starve.__name__, name, code, " ".join(said.read().split())])
print(json.dumps(found))
"""

SAYS = {
    "open_files": "files open and may have 256 ('ulimit -n'). Raise it",
    "memory": "there is no memory left for it",
    "maps": "vm.max_map_count allows",
}


@pytest.fixture(scope="module", params=["dumps", "shards"])
def large(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Three records of 16 MB each."""
    folder = tmp_path_factory.mktemp("large")
    features = torch.zeros(1 << 12, 1 << 11, dtype=torch.bfloat16)
    ids, mask = torch.zeros(1 << 12, dtype=torch.int32), torch.ones(1 << 12, dtype=torch.uint8)
    for number in range(3):
        if request.param == "dumps":
            content = {"input_ids": ids, "loss_mask": mask, "hidden_state": features}
            torch.save(content, folder / f"data_{number}.ckpt")
        else:
            write_shard(folder / shard_name(number), [Record(number, ids, mask, features)])
    return folder


def test_what_the_machine_lacks_is_never_called_damage(large: Path) -> None:
    """Whoever meets it first, its message says what ran out; nothing is left out, and nobody is told to delete."""
    spare = len(shard_paths(large)[:1])  # one file at a time; a dump takes no more, so that it has none
    found = json.loads(command("-c", STARVED, large, spare).out.splitlines()[-1])
    for what, way, code, said in found:
        assert (code, "left out" in said) == (0, False) or (code == 1 and SAYS[what] in said and "keep it" in said), (
            said
        )
        assert not re.search("is damaged|left out|Delete|Traceback", said), (what, way, said)
    assert {(what, way) for what, way, code, _ in found if code} >= {(what, "verify") for what in SAYS}


#: Trains, and says of every process how many records it read before training, and what its store holds.
COUNTING = """
import os, sys
from eagle.entry import run
from eagle.store.shard import Shard
from eagle.train import main

reads, stored, opened = [], Shard.stored, main.open_store
Shard.stored = lambda self, position, **more: (reads.append(position), stored(self, position, **more))[1]

def open_store(*words):
    store = opened(*words)
    print(f"rank {os.environ['RANK']} read {len(reads)} and has {[int(n) for n in store.groups]} {store.tokens}")
    return store

main.open_store = open_store
sys.exit(run(lambda: main.main(sys.argv[1:])))
"""


@pytest.fixture
def damaged(store: Path, tmp_path: Path) -> Path:
    """One flipped bit in the last record of a shard, and another shard that ends too early."""
    shutil.copytree(store, tmp_path / "store")
    (path,) = shard_paths(tmp_path / "store" / "0")
    item = FeatureStore(store)[0]
    content = bytearray(path.read_bytes())
    content[content.find(item.hidden_state.view(torch.uint8).numpy().tobytes())] ^= 1
    path.write_bytes(content)
    path.with_name(shard_name(1)).write_bytes(path.read_bytes()[:-9])
    return tmp_path / "store"


def two_processes(tmp_path: Path, *words: object, code: int = 0) -> tuple[str, str]:
    """What two processes of training say on stdout and stderr."""
    script = tmp_path / "counting.py"
    script.write_text(COUNTING)
    launch = ["torchrun", "--standalone", "--nproc_per_node", 2, script]
    answer = command(*launch, *words, "--skip_damaged", code=code, PYTHONPATH=str(Path.cwd()))
    return answer.out, answer.err


def test_one_process_looks_for_damage_and_tells_the_others(
    damaged: Path, store: Path, llama: Path, tmp_path: Path
) -> None:
    cpdir = tmp_path / "run"
    words = ["--tmpdir", damaged, "--basepath", llama, "--cpdir", cpdir, "--max_steps", 2, "--bs", 4]
    out, err = two_processes(tmp_path, *words)
    records = len(FeatureStore(store))
    first, second = sorted(re.findall(r"rank \d read .*", out))
    assert first.startswith(f"rank 0 read {records} and") and second.startswith("rank 1 read 0 and")
    assert first.partition(" and has ")[2] == second.partition(" and has ")[2]
    assert len(re.findall(r"\d+", first)) == 3 + records - 1, "one record is left out"
    assert err.count("--skip_damaged: 1 files and 1 records are left out") == 1
    assert (resolve_pointer(cpdir / "last") / "model.safetensors").is_file()


def test_what_ends_the_process_that_looks_ends_the_others(store: Path, llama: Path, tmp_path: Path) -> None:
    """At once, with the same error: both say it."""
    shutil.copytree(store, tmp_path / "store")
    for path in shard_paths(tmp_path / "store" / "0"):
        path.write_bytes(b"?")
    words = ["--tmpdir", tmp_path / "store", "--basepath", llama, "--cpdir", tmp_path / "run"]
    _, err = two_processes(tmp_path, *words, code=1)
    assert " ".join(err.split()).count("none of its files is whole") == 2
