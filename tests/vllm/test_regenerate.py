"""Replies through a real server, started as a job starts its own: killed twice, they are the target's own."""

from __future__ import annotations

import json
import os
import signal
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

from eagle.data.loss_mask import load_encoder
from eagle.regenerate.journal import journal_path
from eagle.regenerate.own_server import own_server
from eagle.regenerate.request import RegenerateRequest
from eagle.target.config import load_config
from tests.e2e.killed import regenerate
from tests.oracle import Shape, write_pair
from tests.tiny import write_sharegpt
from tests.vllm.test_quickstart import MODEL

COUNT, KILLS = 20, 2
ENGINE = "--enforce-eager --max-model-len 512 --disable-log-stats"
#: Two tokens that are nearer than this may change places by rounding alone.
_TIE = 1e-3


@pytest.fixture(scope="module")
def target(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The quickstart's model where it is there, which ends its replies; else an oracle pair's."""
    if (MODEL / "config.json").is_file():
        return MODEL
    return write_pair(tmp_path_factory.mktemp("regenerate"), Shape("qwen2", kv_heads=2))[0]


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    def talk(number: int) -> list[dict[str, str]]:
        said = f"Say only the word number {number}.", f"What is {number} plus {number + 1}?"
        return [{"from": "human", "value": text} for text in said]

    records = [{"id": number, "conversations": talk(number)} for number in range(COUNT)]
    return write_sharegpt(tmp_path_factory.mktemp("questions") / "data.json", records)


@pytest.fixture(scope="module")
def url(target: Path, data: Path) -> Iterator[str]:
    encoder = load_encoder(target, load_config(target))
    request = RegenerateRequest(target, data, data.with_name("x.jsonl"), dtype="float32", engine_args=ENGINE)
    with own_server(request, encoder, Path(sys.executable), torch.float32) as address:
        yield address.url


def replies_in(journal: Path) -> int:
    return journal.read_bytes().count(b"\n") - 1 if journal.is_file() else 0


def test_killed_twice_every_reply_is_what_the_target_says_by_itself(target, data, url, tmp_path):
    output = tmp_path / "own.jsonl"
    words = ["--server", url, "--model_name", target, "--data_path", data, "--output", output]
    words += ["--max_new_tokens", 32, "--concurrency", 4]
    journaled: list[bytes] = []
    for kill in range(KILLS):
        process, deadline = regenerate(words), time.monotonic() + 300
        while replies_in(journal_path(output)) < 6 * (kill + 1) and time.monotonic() < deadline:
            assert process.exitcode is None, "it ended before it was killed"
            time.sleep(0.01)
        os.kill(process.pid, signal.SIGKILL)
        process.join()
        assert not output.exists()
        journaled.append(journal_path(output).read_bytes().rpartition(b"\n")[0])
    assert journaled[1].startswith(journaled[0]) and len(journaled[1]) > len(journaled[0])
    process = regenerate(words)
    process.join(300)
    assert process.exitcode == 0
    records = [json.loads(line) for line in output.read_text(encoding="utf-8").splitlines()]
    assert [record["id"] for record in records] == list(range(COUNT))
    assert {record["reply_tokens"] for record in records} == {"sampled"}
    check_greedy(target, records)


def check_greedy(target: Path, records: list[dict]) -> None:
    """Every sampled token is the one that transformers finds likeliest behind those before it, in float32."""
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(str(target)).float().eval()
    found = ties = 0
    for record in records:
        several = isinstance(record["input_ids"][0], list)
        rows = zip(*(record[name] if several else [record[name]] for name in ("input_ids", "loss_mask")), strict=True)
        for ids, mask in rows:
            tokens, trained = torch.tensor(ids), torch.tensor(mask[1:]) == 1
            with torch.inference_mode():
                logits = model(tokens[None]).logits[0, :-1][trained]
            said = tokens[1:][trained]
            behind = logits.max(-1).values - logits.gather(1, said[:, None])[:, 0]
            assert (behind < _TIE).all(), (record["id"], behind.max())
            found, ties = found + len(said), ties + int((behind > 0).sum())
    print(f"\n{found} sampled tokens in {len(records)} conversations, {ties} of them of two as likely")
    assert found > 10 * len(records) / 2 and ties <= found // 100
