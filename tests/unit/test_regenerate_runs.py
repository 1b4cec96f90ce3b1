"""Whole runs of regenerating replies: servers that cut prompts, contexts that change, jobs that are gone on with."""

from __future__ import annotations

import contextlib
import json
from pathlib import Path
from typing import Any

import pytest
import torch

from eagle.data.prompts import encode_messages
from eagle.errors import RequestError, WorkError
from eagle.regenerate import job
from eagle.regenerate import own_server as own_servers
from eagle.regenerate.address import Address
from eagle.regenerate.conversations import Conversations
from eagle.regenerate.journal import Journal, journal_path
from eagle.regenerate.main import main
from eagle.regenerate.own_server import server_command
from eagle.regenerate.request import RegenerateRequest
from eagle.target.config import load_config
from tests.serving import FakeServer, Fault
from tests.tiny import conversations, make_target, write_sharegpt
from tests.unit import test_regenerate as others
from tests.unit.test_regenerate import COUNT, ask, output, words

target, encoder, data, hurried = others.target, others.encoder, others.data, others.hurried
TGI = "Input validation error: `inputs` tokens + `max_new_tokens` must be <= {}. Given: 1500 `inputs` tokens and 1024"
LLAMA_CPP = "the request exceeds the available context size, try increasing it"


@pytest.fixture
def lengths(tmp_path: Path) -> Path:
    """Ten short questions, and a long one among the first."""
    records = [{"id": n, "conversations": [{"from": "human", "value": f"question {n}"}]} for n in range(10)]
    records.insert(1, {"id": "long", "conversations": [{"from": "human", "value": "hello " * 60}]})
    return write_sharegpt(tmp_path / "lengths.json", records)


def test_a_server_that_cuts_prompts_without_a_word_is_noticed(capsys, target, encoder, lengths):
    class Cutting(FakeServer):
        def _reply(self, path: str, body: dict[str, Any], prompt: list[int]) -> dict[str, Any]:
            answer = super()._reply(path, body, prompt[-80:])
            answer["usage"]["prompt_tokens"] += 1  # it counts a token more than there are here
            return answer

    with Cutting(encoder, gives_ids=False) as server:
        said = ask(capsys, server, target, lengths)
    assert "shorter 1 ended where the server counts fewer tokens than the prompt has" in said
    assert [record["id"] for record in output(lengths)] == list(range(10))


def test_penalties_are_not_left_to_the_server(capsys, target, encoder, data):
    with FakeServer(encoder) as server:
        ask(capsys, server, target, data)
    for body in server.bodies:
        assert (body["presence_penalty"], body["frequency_penalty"], body["min_p"]) == (0.0, 0.0, 0.0)


@pytest.mark.parametrize("refusal", [TGI, LLAMA_CPP])
@pytest.mark.parametrize("gives_ids", [True, False])
def test_a_long_question_costs_itself_alone_and_a_shorter_reply_is_taken(
    capsys, target, encoder, lengths, gives_ids, refusal
):
    """Of a server that does not tell its context: the long one is among those that are compared at the start."""
    with FakeServer(encoder, gives_ids=gives_ids, max_model_len=None) as server:
        server.limit, server.refusal = 100, refusal
        said = ask(capsys, server, target, lengths, "--max_new_tokens", 20 if refusal == LLAMA_CPP else 95)
        assert [record["id"] for record in output(lengths)] == list(range(10))
    assert "shorter 1 ended where the prompt leaves no room" in said
    if refusal == TGI:
        told = [body["max_tokens"] for body in server.bodies]
        assert any(room < 95 for room in told) and max(told) == 95
        # Once it is known, nothing longer is asked for; what was asked for at once at the start was.
        assert sum(server.asked.values()) <= 2 * 11


def test_each_probe_is_too_long(capsys, target, encoder, data):
    with FakeServer(encoder, max_model_len=None) as server:
        server.limit = 3
        assert "prompts too long" in ask(capsys, server, target, data, code=2)


@pytest.mark.parametrize("tells", [True, False])
def test_what_the_context_ended_is_asked_again_of_a_longer_one(capsys, target, encoder, lengths, tells):
    """And nothing else is, nor is it of the same one where that is known."""
    poison = {"error": {"message": "it crashed"}}

    def fault(number: int, body: dict[str, Any]) -> Fault | None:
        return Fault(500, poison) if "question 9" in encoder.tokenizer.decode(body["prompt"]) else None

    common = ["--retries", 1, "--max_new_tokens", 20]
    with FakeServer(encoder, fault=fault) as server:
        limit = 100
        server.limit, server.max_model_len = limit, limit if tells else None
        server.refusal = LLAMA_CPP
        ask(capsys, server, target, lengths, *common, code=1)
        before = set(server.asked)
        assert "long" not in [record["id"] for record in output(lengths)]
        server.asked.clear()
        ask(capsys, server, target, lengths, *common, code=1)
        assert len(server.asked) == (1 if tells else 2)  # the one that fails; where it does not tell, the refused one
        server.limit, server.max_model_len = 4096, 4096 if tells else None
        server.asked.clear()
        server.fault = lambda number, body: None
        ask(capsys, server, target, lengths, *common)
        assert len(server.asked) == 2 and len(set(server.asked) - before) == tells
        assert "long" in [record["id"] for record in output(lengths)]


def test_a_reply_that_the_context_cut_is_asked_again_of_a_longer_one(capsys, target, encoder, lengths):
    prompt = encode_messages([{"role": "user", "content": "question 0"}], encoder)
    with FakeServer(encoder, max_model_len=len(prompt) + 12) as server:
        fails_at(server, 8)
        ask(capsys, server, target, lengths, "--retries", 0, "--concurrency", 1, code=1)
        lines = [json.loads(line) for line in journal_path(lengths.with_name("own.jsonl")).read_bytes().splitlines()]
        cut = [line for line in lines[1:] if line["finish"] == "length" and line["context"] == server.limit]
        assert cut and any(line["finish"] == "stop" for line in lines[1:])
        fails_at(server, 999)
        server.limit = server.max_model_len = 4096
        said = ask(capsys, server, target, lengths)
        assert server.number == 11 - 8 + len(cut)
    assert "cut off" not in said and "no room" not in said and len(output(lengths)) == 11


def fails_at(server: FakeServer, number: int) -> None:
    server.number, server.fault = 0, lambda at, body: Fault(502) if at >= number else None


def test_an_overwrite_that_was_interrupted_is_gone_on_with(capsys, target, encoder, data):
    """Without the flag, too; until it is whole the output is the old one."""
    with FakeServer(encoder) as server:
        ask(capsys, server, target, data)
        before = output(data)
        for more in (["--temperature", 1], []):  # other options, and the same ones
            server.fault = lambda number, body: None
            ask(capsys, server, target, data, "--overwrite")
            fails_at(server, 5)
            given = [*more, "--retries", 0, "--concurrency", 1]
            ask(capsys, server, target, data, *given, "--overwrite", code=1)
            assert output(data) == before and journal_path(data.with_name("own.jsonl")).exists()
            fails_at(server, 999)
            assert "going on: 5 replies" in ask(capsys, server, target, data, *more)
            assert server.number == 2 * COUNT - 5
            assert "complete already" in ask(capsys, server, target, data, *more)


def test_a_job_that_ended_before_its_journal_did_is_complete(capsys, target, encoder, data, monkeypatch):
    with FakeServer(encoder) as server:
        monkeypatch.setattr(Journal, "remove", lambda self: None)
        ask(capsys, server, target, data)
        server.down = Fault()
        assert "complete already" in ask(capsys, server, target, data)
        assert not journal_path(data.with_name("own.jsonl")).exists()


def test_an_output_of_another_model_is_not_this_ones(capsys, target, encoder, data):
    with FakeServer(encoder, models=("a", "b")) as server:
        ask(capsys, server, target, data, "--served_model", "a")
        assert "by the same options and a;" in ask(capsys, server, target, data, "--served_model", "a")
        said = ask(capsys, server, target, data, "--served_model", "b", code=2)
        assert "It was made otherwise: model was 'a', now 'b'" in said
    with pytest.raises(RequestError, match="engine was 'server', now 'own'"):
        main([*words(target, data), "--engine", "own"])


def test_flags_of_the_engine_are_compared(capsys, target, encoder, data, monkeypatch, tmp_path):
    """One that decides the replies has to be the same for a job to go on; one of memory need not."""
    monkeypatch.setattr(job, "vllm_python", lambda request: tmp_path / "python")
    with FakeServer(encoder) as server:

        @contextlib.contextmanager
        def own_server(*_: object):
            yield Address(server.url)

        monkeypatch.setattr(job, "own_server", own_server)
        given = words(target, data, "--retries", 0, "--concurrency", 1)
        fails_at(server, 5)
        flags = "--engine_args=--quantization fp8 -tp 2"
        with pytest.raises(WorkError, match="does not answer"):
            main([*given, flags])
        fails_at(server, 999)
        with pytest.raises(RequestError, match=r"engine_args was \['--quantization fp8'\], now \[\]"):
            main(given)
        main([*given, "--engine_args=--quantization fp8 --gpu-memory-utilization 0.5"])
        assert "going on: 5 replies" in capsys.readouterr().out and len(output(data)) == COUNT


def test_a_running_jobs_journal_is_not_overwritten(capsys, target, encoder, data):
    path = journal_path(data.with_name("own.jsonl"))
    with FakeServer(encoder) as server:
        fails_at(server, 5)
        ask(capsys, server, target, data, "--retries", 0, "--concurrency", 1, code=1)
        fails_at(server, 999)
        content = path.read_bytes()
        with Journal(path, {}):
            said = ask(capsys, server, target, data, "--temperature", 1, "--overwrite", code=2)
        assert "in use by another running job" in said and path.read_bytes() == content and not server.number


def test_an_id_that_no_file_can_hold(capsys, target, encoder, tmp_path):
    records = [{"id": name, "conversations": [{"from": "human", "value": f"q {name!r}"}]} for name in ("a", "\ud83d")]
    data = tmp_path / "data.json"
    data.write_text(json.dumps(records))
    with FakeServer(encoder) as server:
        ask(capsys, server, target, data)
    assert [record["id"] for record in output(data)] == ["a", "data_1"]
    assert Conversations([{}]).name(0, "caf\udce9") == "caf?_0"


def test_a_key_is_sent_and_never_shown(capsys, target, encoder, data, monkeypatch):
    with FakeServer(encoder) as server:
        monkeypatch.setenv("OPENAI_API_KEY", "sk-secret\r\n")
        ask(capsys, server, target, data)
        assert server.headers[0]["Authorization"] == "Bearer sk-secret"
        for key in ("sk-sec\rret", "sk-secrét"):
            monkeypatch.setenv("OPENAI_API_KEY", key)
            said = ask(capsys, server, target, data, "--overwrite", code=2)
            assert "OPENAI_API_KEY has a character" in said and "sec" not in said
    for url in ("http://me:secret@h/v1", "http://me:secret@h:x/v1", "ftp://me:secret@h"):
        with pytest.raises(RequestError, match=r"--server \w+://\.\.\.@h") as refused:
            main([*words(target, data), "--server", url])
        assert "secret" not in str(refused.value)


def test_a_server_without_a_list_of_models(capsys, target, encoder, data):
    class Listless(FakeServer):
        def answer(self, path: str, body: dict[str, Any]) -> tuple[int, Any, dict[str, str]] | None:
            return (404, {"detail": "Not Found"}, {}) if path == "/v1/models" else super().answer(path, body)

    with Listless(encoder) as server:
        assert "--served_model" in ask(capsys, server, target, data, code=2)
        ask(capsys, server, target, data, "--served_model", "target")
        assert len(output(data)) == COUNT


@pytest.mark.parametrize(
    ("more", "told"),
    [
        (["--server", "http://H:80/v1", "http://h/v1/"], "names one address twice"),
        (["--server", "https://H/v1", "https://h:443/v1"], "names one address twice"),
        (["--engine_args=--port 5"], "--engine_args has --port, and the vLLM"),
        (["--engine_args=--api_key=x"], "--engine_args has --api-key"),
        (["--engine_args=--ssl-keyfile x"], "--engine_args has --ssl-keyfile"),
        (["--engine_args=--a 'b"], "expected words as in a shell"),
        (["--max_outage", "-1"], "--max_outage -1: expected a number of seconds"),
    ],
)
def test_requests_that_are_wrong(target, data, more, told):
    with pytest.raises(RequestError, match=told):
        main([*words(target, data), *more])


def test_what_is_left_out_of_the_data_is_said_and_in_the_report(capsys, target, encoder, tmp_path):
    """A split is named as the message says; of the folder alone, train is taken."""
    folder = tmp_path / "uc"
    folder.mkdir()
    lines = [json.dumps(record) for record in conversations(COUNT)]
    (folder / "train-00000-of-00001.jsonl").write_text("\n".join([*lines, '{"conver']))
    (folder / "test-00000-of-00001.jsonl").write_text("\n".join(lines[:2]))
    for name, count, parts in (
        (folder, COUNT, ["of its splits, train is used", f"record {COUNT}, from byte", "--end_num 99: "]),
        (folder / "train", COUNT, [f"record {COUNT}, from byte", "--end_num 99: "]),
        (folder / "test", 2, ["--end_num 99: the file holds 2 conversations"]),
    ):
        given = words(target, name, "--output", tmp_path / "own.jsonl", "--end_num", 99, "--allow_truncated")
        with FakeServer(encoder) as server:
            assert main([*given, "--overwrite", "--server", server.url]) == 0
        said = capsys.readouterr().out
        notes = json.loads((tmp_path / "own.jsonl.report.json").read_text())["notes"]
        assert len(notes) == len(parts) and f"{count} conversations, " in said
        for note, part in zip(notes, parts, strict=True):
            assert part in note and f"  note: {note}\n" in said


@pytest.mark.parametrize(
    ("has_vllm", "more", "told"),
    [
        (False, ["--engine_args=-tp 2"], "--engine_args -tp 2 would do nothing: .* there is no vLLM here. Name the "),
        (False, ["--retries", "3"], "--retries 3 would do nothing: .* with --engine_python, or leave it out"),
        (False, ["--timeout", "9"], "--timeout 9.0 would do nothing"),
        (False, ["--engine", "own", "--max_outage", "9"], "--max_outage 9.0 would do nothing: .* --engine own decodes"),
        (True, ["--engine", "own", "--retries", "3"], "--retries 3 would do nothing: .* --engine own decodes"),
        (True, ["--device", "cpu"], "--device cpu would do nothing: vLLM takes .*, or add --engine own"),
        (True, ["--engine", "vllm", "--device", "cpu"], "--device cpu would do nothing: vLLM .* Leave it out.$"),
    ],
)
def test_flags_of_the_engine_that_is_not_taken(target, data, monkeypatch, has_vllm, more, told):
    """--engine auto takes what is there; what is said of the other would do nothing."""
    monkeypatch.setattr(own_servers, "installed_vllm", lambda: "0.32.0" if has_vllm else None)
    with pytest.raises(RequestError, match=told):
        main([*words(target, data), *more])
    assert sorted(path.name for path in data.parent.iterdir()) == ["data.json"]


def test_an_engine_computes_in_the_dtype_of_the_base_model(tmp_path):
    folder = make_target(tmp_path / "m", "qwen2", hidden=16, layers=1)
    data = write_sharegpt(tmp_path / "d.json", conversations(1))
    for saved, named, expected in (
        ("float32", "auto", "float32"),
        ("bfloat16", "auto", "bfloat16"),
        (None, "auto", "float32"),
        ("float32", "bf16", "bfloat16"),
    ):
        path = folder / "config.json"
        content = {
            key: value for key, value in json.loads(path.read_text()).items() if key not in ("dtype", "torch_dtype")
        }
        path.write_text(json.dumps({**content, **({"torch_dtype": saved} if saved else {})}))
        request = RegenerateRequest(folder, data, tmp_path / "o.json", dtype=named)
        dtype = job.engine_dtype(request, load_config(folder))
        assert dtype == getattr(torch, expected)
        command = server_command(request, Path("python"), Path("t"), 1, dtype)
        assert command[command.index("--dtype") + 1] == expected


def test_on_a_cpu_prompts_that_are_sampled_from_are_not_cut_into_chunks(tmp_path):
    """vLLM's engine dies where a request with a seed has a part of its prompt computed: its generator is wound back."""
    folder = make_target(tmp_path / "m", "llama", hidden=16, layers=1)
    data = write_sharegpt(tmp_path / "d.json", conversations(1))

    def told(temperature: float) -> list[str]:
        request = RegenerateRequest(folder, data, tmp_path / "o.json", temperature=temperature)
        return server_command(request, Path("python"), Path("t"), 1, torch.bfloat16)

    assert "--no-enable-chunked-prefill" in told(0.8)
    assert "--no-enable-chunked-prefill" not in told(0.0)


def test_replies_of_other_weights_are_not_complete(tmp_path, capsys):
    """In the same folder, of the same config: the base model was trained on since."""
    folder = make_target(tmp_path / "m", hidden=16, layers=1)
    data = write_sharegpt(tmp_path / "d.json", conversations(1, turns=1))
    ours = [*words(folder, data), "--engine", "own", "--max_new_tokens", "2", "--dtype", "float32", "--device", "cpu"]
    for said in ("1 conversations, ", "complete already"):
        assert main(ours) == 0
        assert said in capsys.readouterr().out
    make_target(folder, hidden=16, layers=1, seed=1)
    with pytest.raises(RequestError, match=r"It was made otherwise: model was 'all-.*, now 'all-.*--overwrite"):
        main(ours)
    assert main([*ours, "--overwrite"]) == 0


@pytest.mark.parametrize("seed", [-1, 2**32])
def test_a_seed_that_chooses_no_conversations_is_refused(tmp_path, seed):
    data = write_sharegpt(tmp_path / "d.json", conversations(1))
    with pytest.raises(RequestError, match=f"--seed {seed}: expected 0 to 4,294,967,295"):
        RegenerateRequest(tmp_path, data, tmp_path / "o.json", seed=seed)
