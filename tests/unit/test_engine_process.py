"""Asking an engine in another process: who asks gets what they asked for, ahead of its use; and how it ends is said."""

from __future__ import annotations

import threading
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import pytest
import torch

from eagle import device
from eagle.errors import RequestError, WorkError
from eagle.generate import engine_process, engine_server
from eagle.generate.engine_process import Address, EngineProcess, RemoteEngine
from eagle.generate.source_options import SourceOptions
from eagle.store.record import Record
from eagle.target.config import load_config
from eagle.target.features import HIDDEN_STATE
from eagle.train import engine
from eagle.train.dataset import FeatureDataset
from eagle.train.loader import AHEAD, Key, Loader, ahead
from eagle.train.options import TrainOptions
from tests.tiny import make_target

CPU = torch.device("cpu")


class Doubles:
    """A source that gives every token twice its number for a feature. asked: the batches, as they came."""

    def __init__(self) -> None:
        self.asked: list[list[list[int]]] = []

    def features(self, sequences):
        self.asked.append([sequence.tolist() for sequence in sequences])
        if sequences[0][0] == 99:
            raise RuntimeError("it was asked for 99")
        rows = [torch.from_numpy(sequence).float()[:, None] * 2 for sequence in sequences]
        return {HIDDEN_STATE: torch.nn.utils.rnn.pad_sequence(rows, batch_first=True)}


@pytest.fixture
def source():
    return Doubles()


@pytest.fixture
def remote(source, tmp_path):
    """Of a server in a thread of this process."""

    def serve():
        try:
            engine_server.serve(source, tmp_path)
        except RuntimeError as error:
            log.write_text(f"an earlier run\nRuntimeError: {error}\n")
            (tmp_path / engine_server.SOCKET).unlink()  # as a process's end does
            for connection in opened:
                connection.close()

    log, opened = tmp_path / "log", []
    log.write_text("an earlier run\n")
    with pytest.MonkeyPatch.context() as patch:
        listen = engine_server._listen
        patch.setattr(
            engine_server, "_listen", lambda connection, asked: (opened.append(connection), listen(connection, asked))
        )
        threading.Thread(target=serve, daemon=True).start()
        found = RemoteEngine(Address(str(tmp_path), str(log), log.stat().st_size))
        while not found.can_be_asked():
            time.sleep(0.01)
        yield found


def test_who_asks_gets_their_own(remote, source, tmp_path):
    batches = [[np.array([number, number + 1]), np.array([number])] for number in range(24)]
    with ThreadPoolExecutor(4) as pool:
        for number, found in enumerate(pool.map(remote.features, batches)):
            assert found[HIDDEN_STATE][:, 0, 0].tolist() == [2 * number, 2 * number]
    # One batch is not put together with another one.
    assert sorted(source.asked) == [[sequence.tolist() for sequence in batch] for batch in batches]
    assert {path.name for path in tmp_path.iterdir()} == {"log", engine_server.SOCKET}


class Asks:
    """A store whose records have an engine's features."""

    def __init__(self, remote):
        self.remote, self.lengths = remote, np.full(24, 3)

    def stored(self, indices):
        ids = [np.full(3, index, dtype=np.int32) for index in indices]
        found = self.remote.features(ids)[HIDDEN_STATE]
        mask = torch.ones(3, dtype=torch.uint8)
        return [
            Record(index, torch.from_numpy(one), mask, found[row]).stored()
            for row, (index, one) in enumerate(zip(indices, ids, strict=True))
        ]


def test_the_next_batches_are_computed_while_one_is_trained_on(remote, source):
    data = FeatureDataset(Asks(remote), np.arange(24), 100, HIDDEN_STATE)
    keys, threads = [Key(0, (number,)) for number in range(24)], 2
    with Loader(data, keys, CPU, torch.float32, threads) as loader:
        (first,) = next(loader.groups(1))
        until = time.monotonic() + 10
        while len(source.asked) < 1 + AHEAD * threads:  # this thread asks for nothing more
            assert time.monotonic() < until, source.asked
            time.sleep(0.01)
        time.sleep(0.05)
        assert first.conversations == (0,) and len(source.asked) == 1 + AHEAD * threads


@pytest.mark.parametrize("threads", [0, 3])
def test_single_records_are_read_ahead_in_their_order(threads):
    read = []

    def slowly(number):
        time.sleep(0.02 if number % 4 == 0 else 0)
        read.append(number)
        return number

    found = ahead(slowly, range(20), threads)
    assert [next(found) for _ in range(5)] == list(range(5))
    time.sleep(0.1)
    assert len(read) == 5 + AHEAD * threads
    found.close()


def test_an_engine_that_has_ended(remote, monkeypatch):
    monkeypatch.setattr(engine_process, "_STARTER_FIRST", 0.0)
    with pytest.raises(WorkError, match=r"(?s)has ended. Its last words, from .*log:.*asked for 99") as raised:
        remote.features([np.array([99])])
    assert "an earlier run" not in str(raised.value)
    with pytest.raises(WorkError, match="has ended"):
        remote.features([np.array([1])])


def test_a_full_folder(remote, monkeypatch):
    def full(*_):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(engine_server, "save_file", full)
    with pytest.raises(WorkError, match=r"takes no more features: .*No space left.*lower --bs"):
        remote.features([np.array([1])])


def test_an_engine_that_does_not_start(tmp_path, monkeypatch):
    """It is not taken for one of the launcher's processes."""
    python, log = tmp_path / "python", tmp_path / "log"
    python.write_text("#!/bin/sh\nenv\necho last\nexit 3\n")
    python.chmod(0o755)
    for name in ("RANK", "LOCAL_RANK", "MASTER_PORT", "TORCHELASTIC_RUN_ID", "KEPT"):
        monkeypatch.setenv(name, "1")
    found = EngineProcess(SourceOptions(tmp_path, torch.float32, CPU), "vllm", python, {"CARDS": "4,5"}, log)
    with pytest.raises(WorkError, match=r"(?s)exited with code 3.*last"):
        found.wait_until_ready()
    found.close()
    said = log.read_text().splitlines()
    assert "KEPT=1" in said and "CARDS=4,5" in said and not found.folder.exists()
    assert not [line for line in said if line.startswith(("RANK", "LOCAL_RANK", "MASTER_", "TORCHELASTIC"))]


@pytest.mark.parametrize(
    ("given", "shown", "says"),
    [
        ({}, "", "needs --engine_cards"),
        ({"engine_cards": (0, 1)}, "", "card 0 is one that trains here"),
        ({"engine_cards": (4, 5)}, "4,5,6", "card 4 is one that trains here"),
        ({"engine_cards": (0,), "engine_args": {"gpu_memory_utilization": 0.4}}, "", None),
        ({"engine_cards": (5, 6)}, "4,5,6", None),
        ({"engine_cards": (6, 7)}, "4,5,6", "=4,5,6 hides 7"),
    ],
)
def test_cards_of_the_engine(given, shown, says, tmp_path, monkeypatch):
    config = load_config(make_target(tmp_path / "target"))
    monkeypatch.setattr(device, "check_indices", lambda *_: None)
    monkeypatch.setattr(engine, "vllm_of", lambda *_: "0.32.0")
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", shown)
    options = TrainOptions(Path("c"), Path("b"), data_path=Path("d.json"), feature_source="vllm", **given)
    where = torch.device("cuda", 0)
    if says is None:
        assert engine.check_engine(options, config, where) == "0.32.0"
    else:
        with pytest.raises(RequestError, match=says):
            engine.check_engine(options, config, where)
