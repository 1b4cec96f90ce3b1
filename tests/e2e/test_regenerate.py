"""Replies that are regenerated as users do it: killed on the way, without a server, read by the next step."""

from __future__ import annotations

import json
import os
import signal
import sys
import time
from pathlib import Path

import pytest

from eagle.data.loss_mask import load_encoder
from eagle.regenerate.journal import journal_path
from eagle.regenerate.main import main
from eagle.store.reader import FeatureStore
from eagle.target.config import load_config
from tests.e2e.commands import command, start
from tests.e2e.killed import regenerate
from tests.serving import FakeServer, runs, write_stand_in
from tests.tiny import conversations, write_sharegpt

CONCURRENCY, KILLS = 4, 2


@pytest.fixture(scope="module")
def questions(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_sharegpt(tmp_path_factory.mktemp("questions") / "data.json", conversations(30, turns=2, seed=3))


def replies_in(journal: Path) -> int:
    return journal.read_bytes().count(b"\n") - 1 if journal.is_file() else 0


def test_killed_twice_it_says_the_same_and_asks_nothing_twice(qwen, questions, tmp_path):
    encoder = load_encoder(qwen, load_config(qwen))
    common = ["--model_name", qwen, "--data_path", questions, "--concurrency", CONCURRENCY]
    with FakeServer(encoder) as server:
        assert main([str(word) for word in [*common, "--server", server.url, "--output", tmp_path / "whole.json"]]) == 0
        every = dict(server.asked)
    assert set(every.values()) == {1}
    output = tmp_path / "own.json"
    journal = journal_path(output)
    with FakeServer(encoder, seconds=0.02) as server:
        words = [*common, "--server", server.url, "--output", output]
        for kill in range(KILLS):
            process = regenerate(words)
            enough, deadline = (kill + 1) * len(every) // (KILLS + 1), time.monotonic() + 60
            while replies_in(journal) < enough and time.monotonic() < deadline:
                assert process.exitcode is None, "it ended before it was killed"
                time.sleep(0.005)
            os.kill(process.pid, signal.SIGKILL)
            process.join()
            assert process.exitcode == -signal.SIGKILL
            assert enough <= replies_in(journal) < len(every)
            assert not output.exists()
        process = regenerate(words)
        process.join(60)
        assert process.exitcode == 0
        assert set(server.asked) == set(every)
        # What was under way when it was killed had not come; everything that had was not asked again.
        assert sum(server.asked.values()) - len(every) <= KILLS * CONCURRENCY
    assert output.read_bytes() == (tmp_path / "whole.json").read_bytes()
    assert not journal.exists() and not list(tmp_path.glob(".*"))
    assert sorted(path.name for path in tmp_path.iterdir()) == [
        "own.json", "own.json.report.json", "whole.json", "whole.json.report.json"
    ]  # fmt: skip


def test_without_a_server_it_decodes_by_itself_and_step_3_reads_that(qwen, data, tmp_path):
    words = ["tools/regenerate.py", "--model_name", qwen, "--data_path", data, "--output", tmp_path / "own.jsonl"]
    words += ["--end_num", 12, "--max_new_tokens", 24, "--dtype", "float32", "--engine", "own"]
    said = command(*words)
    assert "decoded here by transformers, float32" in said.out
    records = [json.loads(line) for line in (tmp_path / "own.jsonl").read_text(encoding="utf-8").splitlines()]
    command(
        "allocation.py", "--outdir", tmp_path / "store", "--model_name", qwen, "--data_path", tmp_path / "own.jsonl",
        "--dtype", "float32", "--device", "cpu",
    )  # fmt: skip
    store = FeatureStore(tmp_path / "store")
    assert len(store) == len(records) > 6
    for record in store:
        source = records[record.conversation]
        assert record.input_ids.tolist() == source["input_ids"] and record.loss_mask.tolist() == source["loss_mask"]


@pytest.mark.skipif(sys.platform != "linux", reason="only Linux tells a process that its parent was killed")
def test_an_engine_ends_with_the_job_that_was_killed(qwen, data, tmp_path):
    words = ["--model_name", qwen, "--data_path", data, "--output", tmp_path / "own.jsonl"]
    process = start("tools/regenerate.py", *words, "--engine_python", sys.executable, **write_stand_in(tmp_path))
    says, deadline = tmp_path / "says", time.monotonic() + 60
    while not (says.exists() and says.read_text()) and time.monotonic() < deadline:
        assert process.poll() is None, process.communicate()
        time.sleep(0.02)
    engine = int(says.read_text().split()[1])
    assert runs(engine)
    process.kill()
    process.communicate(timeout=30)
    while runs(engine) and time.monotonic() < deadline:
        time.sleep(0.02)
    assert not runs(engine)
