"""A job's conversations as tokens: the same however they are encoded, kept, and what they count."""

import contextlib
import mmap
import os
import signal
import time

import numpy as np
import psutil
import pytest

from eagle.data import tokens as tokens_module
from eagle.data.cleaning import Dropped, Tally, clean_record
from eagle.data.loss_mask import load_encoder
from eagle.data.reader import open_records
from eagle.data.tokens import Tokens, encode, encode_all, load_tokens, save_tokens
from eagle.errors import WorkError
from eagle.target.config import load_config
from tests.tiny import conversations, make_target, write_sharegpt

BROKEN = [None, {"conversations": []}, {"conversations": [{"from": "human", "value": "?"}]}]
#: A reply before the first question, which is left out.
MENDED = {"conversations": [{"from": "gpt", "value": "hi"}, *conversations(1)[0]["conversations"]]}


@pytest.fixture(scope="module")
def inputs(tmp_path_factory):
    folder = tmp_path_factory.mktemp("inputs")
    model = make_target(folder / "model")
    data = write_sharegpt(folder / "data.json", [*conversations(290), *BROKEN, MENDED])
    return open_records(data), load_encoder(model, load_config(model))


def same(a: Tokens, b: Tokens) -> bool:
    return all(np.array_equal(getattr(a, name), getattr(b, name)) for name in Tokens.__slots__)


def test_every_conversation_is_what_the_encoder_makes_of_it(inputs):
    records, encoder = inputs
    order = list(reversed(range(len(records))))
    tokens = encode(records, encoder, order, 200)
    for position, index in enumerate(order):
        try:
            expected = encoder.encode(clean_record(records[index], Tally()), 200, Tally()).input_ids.tolist()
        except Dropped:
            expected = []
        assert tokens[position].input_ids.tolist() == expected
    whole, parts = tokens.tally(), Tally()
    for start in range(0, len(order), 7):
        parts.add(tokens.tally(slice(start, start + 7)))
    assert whole == parts
    assert whole.dropped["empty_conversation"] == whole.dropped["not_an_object"] == 1
    assert whole.repaired["leading_reply_skipped"] == 1


@pytest.mark.parametrize("processes", [1, 3])
def test_processes_change_nothing(inputs, processes):
    records, encoder = inputs
    order = range(len(records))
    assert same(encode_all(records, encoder, order, 4096, processes), encode(records, encoder, order, 4096))


def test_a_process_that_is_killed_ends_the_job(inputs, monkeypatch):
    def killed(*_):
        os.kill(os.getpid(), signal.SIGKILL)

    monkeypatch.setattr(tokens_module, "encode", killed)
    with pytest.raises(WorkError, match="tokenises conversations was killed"):
        encode_all(*inputs, range(290), 4096, processes=2)


@pytest.mark.skipif(not hasattr(os, "fork"), reason="forks")
def test_processes_end_with_their_parent(inputs, monkeypatch):
    monkeypatch.setattr(tokens_module, "encode", lambda *_: time.sleep(600))
    child = os.fork()
    if not child:
        os.setpgid(0, 0)
        encode_all(*inputs, range(290), 4096, processes=2)
    deadline = time.monotonic() + 30
    while len(group_of(child)) < 3:
        assert time.monotonic() < deadline
        time.sleep(0.05)
    os.kill(child, signal.SIGKILL)
    os.waitpid(child, 0)
    while group_of(child):
        assert time.monotonic() < deadline, "they outlived it"
        time.sleep(0.05)


def group_of(leader):
    found = []
    for pid in psutil.pids():
        with contextlib.suppress(ProcessLookupError):  # it has just ended
            found += [pid] * (os.getpgid(pid) == leader)
    return found


@pytest.mark.parametrize("workers", [1, 2, 3])
def test_shares(inputs, monkeypatch, workers):
    """Every usable conversation once, sorted by length in blocks that are dealt in turn."""
    records, encoder = inputs
    monkeypatch.setattr(tokens_module, "LENGTH_BLOCK", 32)
    tokens = encode(records, encoder, range(len(records)), 4096)
    shares = [tokens.share(worker, workers) for worker in range(workers)]
    usable = [place for place in range(len(tokens)) if tokens.lengths[place]]
    assert sorted(place for share in shares for place in share) == usable
    for worker, share in enumerate(shares):
        assert all(place % workers == worker for place in share)
        blocks = [share[at : at + 32] for at in range(0, len(share), 32)]
        assert [sorted(block) for block in blocks] == [sorted(share)[at : at + 32] for at in range(0, len(share), 32)]
        for block in blocks:
            lengths = tokens.lengths[block].tolist()
            assert lengths == sorted(lengths, reverse=True)
        assert tokens.lengths[share[0]] > tokens.lengths[share[31]], "there was something to sort"


def test_kept_for_the_same_job_alone(inputs, tmp_path):
    records, encoder = inputs
    tokens, path = encode(records, encoder, range(20), 4096), tmp_path / "tokens"
    assert load_tokens(path, "key") is None
    save_tokens(path, tokens, "key")
    found = load_tokens(path, "key")
    assert found and same(found, tokens)
    assert load_tokens(path, "another") is None
    path.write_bytes(path.read_bytes()[:-1])
    assert load_tokens(path, "key") is None
    assert [p.name for p in tmp_path.iterdir()] == ["tokens"]


def test_what_is_kept_is_mapped_and_not_read_into_memory(inputs, tmp_path):
    records, encoder = inputs
    save_tokens(tmp_path / "tokens", encode(records, encoder, range(20), 4096), "key")
    found = load_tokens(tmp_path / "tokens", "key")
    for name in ("input_ids", "loss_mask", "offsets"):
        array = getattr(found, name)
        while isinstance(array.base, np.ndarray):
            array = array.base
        assert isinstance(array.base, mmap.mmap), name
    assert not found[0].input_ids.flags.owndata, "a row is no copy either"


def test_nothing_usable(inputs, tmp_path):
    records, encoder = inputs
    tokens = encode_all(records, encoder, [290, 291, 292], 4096)
    assert tokens.lengths.tolist() == [0, 0, 0]
    save_tokens(tmp_path / "tokens", tokens, "key")
    assert same(load_tokens(tmp_path / "tokens", "key"), tokens)
    assert sum(tokens.tally().dropped.values()) == 3
