"""The target's own replies: what is asked, what is kept, what is trained, and what is refused.

Whole runs against a server in this process, with every fault that a server has.
"""

from __future__ import annotations

import functools
import json
import threading
from pathlib import Path
from typing import Any

import pytest

from eagle.data.cleaning import Tally
from eagle.data.loss_mask import Encoder, load_encoder
from eagle.data.reader import open_records
from eagle.data.token_source import encode_record
from eagle.entry import run
from eagle.errors import RequestError
from eagle.regenerate import job
from eagle.regenerate.journal import journal_path
from eagle.regenerate.main import main
from eagle.regenerate.transport import Servers
from eagle.target.config import load_config
from tests.serving import FakeServer, Fault, reply_to
from tests.tiny import byte_level_tokenizer, conversations, make_target, write_sharegpt

COUNT = 6


@pytest.fixture(scope="module")
def target(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_target(tmp_path_factory.mktemp("regenerate") / "target", "qwen2", hidden=16, layers=1)


@pytest.fixture(scope="module")
def encoder(target: Path) -> Encoder:
    return load_encoder(target, load_config(target))


@pytest.fixture
def data(tmp_path: Path) -> Path:
    return write_sharegpt(tmp_path / "data.json", conversations(COUNT, turns=2))


@pytest.fixture(autouse=True)
def hurried(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(job, "Servers", functools.partial(Servers, first_wait=0.02))
    monkeypatch.delenv("OPENAI_API_KEY", raising=False)


def words(target: Path, data: Path, *more: object) -> list[str]:
    given = ["--model_name", target, "--data_path", data, "--output", data.with_name("own.jsonl"), *more]
    return [str(word) for word in given]


def ask(capsys: pytest.CaptureFixture[str], server: FakeServer, *given: Any, code: int = 0) -> str:
    """What the command says, on one line."""
    # Ten seconds without an answer are a test's own fault.
    found = run(lambda: main(["--max_outage", "10", *words(*given), "--server", server.url]))
    said = capsys.readouterr()
    assert found == code, said.out + said.err
    return " ".join((said.err if code else said.out).split())


def output(data: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in data.with_name("own.jsonl").read_text(encoding="utf-8").splitlines()]


def pieces(record: dict[str, Any]) -> list[tuple[int, list[int]]]:
    """A row cut where its mask changes: the mask and the tokens of every piece."""
    found: list[tuple[int, list[int]]] = []
    for token, mask in zip(record["input_ids"], record["loss_mask"], strict=True):
        if not found or found[-1][0] != mask:
            found.append((mask, []))
        found[-1][1].append(token)
    return found


def test_replies_become_history_and_step_3_takes_what_was_sampled(capsys, target, encoder, data):
    with FakeServer(encoder) as server:
        said = ask(capsys, server, target, data)
    assert f"{COUNT} conversations, {2 * COUNT} replies" in said and "its own token ids" in said
    source, records = json.loads(data.read_text()), output(data)
    assert [record["id"] for record in records] == [record["id"] for record in source]
    mended = open_records(data.with_name("own.jsonl"))
    for index, (before, after) in enumerate(zip(source, records, strict=True)):
        said_before, said_now = before["conversations"], after["conversations"]
        assert [turn["value"] for turn in said_now[::2]] == [turn["value"] for turn in said_before[::2]]
        prompt, reply, then, last = pieces(after)
        assert (prompt[0], reply[0], then[0], last[0]) == (0, 1, 0, 1)
        for sampled, before_it, turn in (
            (reply[1], prompt[1], said_now[1]),
            (last[1], prompt[1] + reply[1] + then[1], said_now[3]),
        ):
            assert sampled[-1] == encoder.tokenizer.eos_token_id
            assert encoder.tokenizer.decode(sampled[:-1]) == turn["value"] == reply_to(before_it)
        assert after["reply_tokens"] == "sampled" and server.asked[tuple(prompt[1])] == 1
        (row,) = encode_record(mended, index, encoder, 4096, Tally())
        assert row.input_ids.tolist() == after["input_ids"] and row.loss_mask.tolist() == after["loss_mask"]
    assert not journal_path(data.with_name("own.jsonl")).exists()
    body = server.bodies[0]
    assert (body["temperature"], body["top_p"], body["repetition_penalty"]) == (0.0, 1.0, 1.0)
    # Again: it is there, and nothing is asked.
    asked = server.number
    assert run(lambda: main([*words(target, data), "--server", "http://127.0.0.1:9/v1"])) == 0
    assert "complete already" in capsys.readouterr().out and server.number == asked


def test_a_hundred_at_once_and_no_prompt_twice(capsys, target, encoder, tmp_path):
    """Of two conversations that begin alike the second question alone is another one; the same one twice is one."""
    both = {"from": "human", "value": "hello"}, {"from": "gpt", "value": "x"}
    records = [{"id": n, "conversations": [{"from": "human", "value": f"question {n}"}]} for n in range(118)]
    records += [{"id": name, "conversations": [*both, {"from": "human", "value": name}]} for name in ("a", "b", "a")]
    data = write_sharegpt(tmp_path / "data.json", records)
    full = threading.Event()

    def fault(number: int, body: dict[str, Any]) -> None:
        """Nobody is answered before a hundred have asked."""
        if number == 99:
            full.set()
        assert full.wait(5)

    with FakeServer(encoder, fault=fault) as server:
        said = ask(capsys, server, target, data)
    assert set(server.asked.values()) == {1} and len(server.asked) == 121 and server.most_at_once == 100
    assert "dropped 1 the same questions as another conversation's" in said
    assert [record["id"] for record in output(data)] == [*range(118), "a", "b"]


def test_system_prompts_are_kept_and_questions_alone_are_enough(capsys, target, encoder, tmp_path):
    records = [
        {"system": "Be brief.", "conversations": [{"from": "human", "value": "hello"}]},
        {"messages": [{"role": "user", "content": "one"}, {"role": "user", "content": "two"}]},
        {"messages": [{"role": "assistant", "content": "nobody asked"}]},
        {"messages": [{"role": "user", "content": "x"}], "tools": [{"name": "f"}]},
    ]
    data = write_sharegpt(tmp_path / "data.json", records)
    with FakeServer(encoder) as server:
        said = ask(capsys, server, target, data)
    first, second = output(data)
    assert first["conversations"][0] == {"from": "system", "value": "Be brief."} and first["id"] == "data_0"
    assert "Be brief." in encoder.tokenizer.decode(first["input_ids"])
    assert [turn["from"] for turn in second["conversations"]] == ["human", "gpt", "human", "gpt"]
    assert "dropped 1 no user speaks" in said and "dropped 1 the record offers tools" in said


def test_the_replies_are_not_put_among_the_questions(capsys, target, encoder, data, tmp_path):
    folder = tmp_path / "folder"
    folder.mkdir()
    data.rename(folder / "data.jsonl")
    with FakeServer(encoder) as server:
        said = ask(capsys, server, target, folder, "--output", folder / "own.jsonl", code=2)
    assert "lies in --data_path" in said and "which is never changed" in said
    assert not server.asked and [path.name for path in folder.iterdir()] == ["data.jsonl"]


def test_sampling_is_told_and_every_request_has_a_seed_of_its_own(capsys, target, encoder, data):
    with FakeServer(encoder) as server:
        ask(capsys, server, target, data, "--temperature", 0.7, "--top_p", 0.8, "--max_new_tokens", 99)
        told = {(body["temperature"], body["top_p"], body["max_tokens"]) for body in server.bodies}
        assert told == {(0.7, 0.8, 99)}
        seeds = [body["seed"] for body in server.bodies]
        assert len(set(seeds)) == len(seeds) == 2 * COUNT
        ask(capsys, server, target, data, "--temperature", 0.7, "--top_p", 0.8, "--max_new_tokens", 99, "--overwrite")
        assert sorted(body["seed"] for body in server.bodies[2 * COUNT :]) == sorted(seeds)


def test_a_reply_that_is_cut_off_has_no_end_of_turn_and_ends_its_conversation(capsys, target, encoder, data):
    for gives_ids in (True, False):
        with FakeServer(encoder, gives_ids=gives_ids) as server:
            said = ask(capsys, server, target, data, "--max_new_tokens", 5, "--overwrite")
        records = output(data)
        cut = [record for record in records if record["conversations"][-1].get("truncated")]
        assert cut and f"cut off {len(cut)} replies" in said and "ended at a reply that --max_new_tokens" in said
        for record in cut:
            *_, (mask, last) = pieces(record)
            assert mask == 1 and encoder.tokenizer.eos_token_id not in last
            assert encoder.tokenizer.decode(last) == record["conversations"][-1]["value"]
            assert record["reply_tokens"] == ("sampled" if gives_ids else "from_text")


def test_a_reply_cut_off_inside_the_reasoning_that_its_prompt_begins_is_kept_open(capsys, target, encoder, data):
    """By token ids as by text alone; where a server keeps the reasoning to itself, what it shows is the answer's."""
    template = data.with_name("r1.jinja")
    template.write_text(
        "{% for m in messages %}<|im_start|>{{ m.role }}\n{{ m.content }}<|im_end|>\n{% endfor %}"
        "{% if add_generation_prompt %}<|im_start|>assistant\n<think>\n{% endif %}"
    )
    own, trained = load_encoder(target, load_config(target), str(template)), []

    def keeps_to_itself(reply, *asked):
        message = {"role": "assistant", "content": "so"}
        return reply(*asked) | {"choices": [{"finish_reason": "length", "message": message}]}

    for gives_ids, shown in ((True, "thinking " * 40), (False, "thinking " * 40), (False, "so")):
        with FakeServer(own, gives_ids=gives_ids, reply=lambda prompt: "thinking " * 40) as server:
            if shown == "so":
                server._reply = functools.partial(keeps_to_itself, server._reply)  # type: ignore[method-assign]
            words = ("--max_new_tokens", 12, "--overwrite", "--chat_template", template)
            if shown == "so":
                assert "Not one conversation has a reply" in ask(capsys, server, target, data, *words, code=1)
                continue
            ask(capsys, server, target, data, *words)
        assert len(output(data)) == COUNT and all(one["conversations"][-1]["truncated"] for one in output(data))
        trained.append([[last for mask, last in pieces(record) if mask] for record in output(data)])
    assert trained[0] == trained[1] and own.tokenizer.decode(trained[0][0][0]).startswith("thinking thinking")


def test_text_alone_is_tokenised_as_step_3_would_and_marked(capsys, target, encoder, data):
    with FakeServer(encoder, gives_ids=False) as server:
        said = ask(capsys, server, target, data)
    assert "gives no token ids" in said
    texts = write_sharegpt(
        data.with_name("texts.json"), [{"conversations": record["conversations"]} for record in output(data)]
    )
    for index, record in enumerate(output(data)):
        assert record["reply_tokens"] == "from_text"
        (row,) = encode_record(open_records(texts), index, encoder, 4096, Tally())
        assert (row.input_ids.tolist(), row.loss_mask.tolist()) == (record["input_ids"], record["loss_mask"])


def test_empty_refused_and_filtered_replies(capsys, target, encoder, tmp_path):
    replies = {"empty": "", "sorry": "I'm sorry, but I cannot do that.", "fine": "yes indeed"}
    records = [{"id": name, "conversations": [{"from": "human", "value": name}]} for name in replies]
    data = write_sharegpt(tmp_path / "data.json", records)

    def reply(prompt: list[int]) -> str:
        text = encoder.tokenizer.decode(prompt)
        return next(said for name, said in replies.items() if name in text)

    with FakeServer(encoder, reply=reply) as server:
        said = ask(capsys, server, target, data)
    assert [record["id"] for record in output(data)] == ["sorry", "fine"]
    assert "kept 1 replies that begin as a refusal" in said and "shorter 1 ended at an empty reply" in said
    assert "dropped 1 of these, as their first reply is missing" in said


def test_a_context_that_is_too_short_ends_conversations(capsys, target, encoder, data):
    """Where the server says how long it is, and where it only refuses."""
    for said_so, code in ((150, None), (None, 150)):

        def fault(number: int, body: dict[str, Any], code: int | None = code) -> Fault | None:
            length = len(body.get("prompt") or ())
            message = "This model's maximum context length is 150 tokens, your prompt has more."
            return Fault(400, {"error": {"message": message}}) if code and length > code else None

        with FakeServer(encoder, max_model_len=said_so, fault=fault) as server:
            said = ask(capsys, server, target, data, "--overwrite")
        assert "ended where the prompt leaves no room in the context" in said
        kept = [len(record["input_ids"]) for record in output(data)]
        assert kept and len(kept) + said.count("first reply is missing") <= COUNT + 1
        assert min(len(record["conversations"]) for record in output(data)) == 2


@pytest.mark.parametrize(
    "error",
    [
        {"message": "The prompt triggered the filter", "code": "content_filter", "type": None},
        {"message": "It is against the policy", "code": "400", "innererror": {"code": "ResponsibleAIPolicyViolation"}},
        {"message": "It is against the policy", "code": None, "inner_error": {"code": "content_filter"}},
        {"message": "Input data may contain inappropriate content.", "code": "data_inspection_failed"},
    ],
)
def test_a_prompt_that_the_servers_filter_keeps_back_ends_its_conversation(capsys, target, encoder, data, error):
    kept_back = json.loads(data.read_text())[2]["conversations"][0]["value"]

    def fault(number: int, body: dict[str, Any]) -> Fault | None:
        return Fault(400, {"error": error}) if kept_back in encoder.tokenizer.decode(body["prompt"]) else None

    with FakeServer(encoder, fault=fault) as server:
        said = ask(capsys, server, target, data)
        assert "ended at a reply that the server kept back (its filter)" in said
        asked = server.number
        assert "complete already" in ask(capsys, server, target, data) and server.number == asked
    ids = [record["id"] for record in json.loads(data.read_text())]
    assert [record["id"] for record in output(data)] == ids[:2] + ids[3:]


def test_a_server_that_keeps_every_prompt_back_is_said_to(capsys, target, encoder, data):
    with FakeServer(encoder) as server:
        server.down = Fault(400, {"error": {"message": "no", "code": "content_filter"}})
        said = ask(capsys, server, target, data, "--served_model", "target", code=2)
    assert "prompts back: " in said and "a server without that filter" in said


@pytest.mark.parametrize(
    "fault",
    [
        Fault(500, {"error": "out of luck"}),
        Fault(503, {"detail": "loading"}),
        Fault(429, {"error": {"message": "slow down"}}, {"Retry-After": "0"}),
        Fault(),
        Fault(200, {"choices": [{"finish_reason": "abort", "token_ids": [5, 6]}]}),
    ],
)
def test_what_passes_is_tried_again(capsys, target, encoder, data, fault):
    with FakeServer(encoder) as server:
        ask(capsys, server, target, data)
        undisturbed = output(data)
    with FakeServer(encoder, fault=lambda number, body: fault if number % 3 == 0 else None) as server:
        ask(capsys, server, target, data, "--overwrite")
    assert output(data) == undisturbed


def test_a_request_that_always_fails_costs_its_conversation_alone(capsys, target, encoder, data):
    poison = json.loads(data.read_text())[2]["conversations"][0]["value"]

    def fault(number: int, body: dict[str, Any]) -> Fault | None:
        return Fault(500, {"error": "it crashed"}) if poison in encoder.tokenizer.decode(body["prompt"]) else None

    ids = [record["id"] for record in json.loads(data.read_text())]
    with FakeServer(encoder, fault=fault) as server:
        # By itself, too: nobody else asks, and a short question shows that the server lives.
        for at_once in (2, 1):
            server.number = 0
            said = ask(capsys, server, target, data, "--retries", 2, "--concurrency", at_once, code=1)
            assert (
                f"1 of {COUNT} conversations lack replies" in said and "The same command asks for these again" in said
            )
            assert [record["id"] for record in output(data)] == [name for name in ids if name != ids[2]]
            assert server.number == (2 * COUNT - 2 + 3 if at_once == 2 else 3)
        report = json.loads(data.with_name("own.jsonl.report.json").read_text())
        assert report["counts"]["end_failed"] == 1 and journal_path(data.with_name("own.jsonl")).exists()
        server.fault = lambda number, body: None
        server.number = 0
        assert "going on" in ask(capsys, server, target, data) and server.number == 2
        assert [record["id"] for record in output(data)] == ids
        assert "complete already" in ask(capsys, server, target, data) and server.number == 2


def test_a_server_that_starts_anew_costs_nothing(capsys, target, encoder, data):
    """Those that were under way when it went, and had seen others answered before, are no more to blame than others."""
    with FakeServer(encoder) as server:

        def fault(number: int, body: dict[str, Any]) -> Fault | None:
            if number == 6:
                server.down = Fault(502, "bad gateway")
                threading.Timer(0.6, lambda: setattr(server, "down", None)).start()
            return server.down

        server.fault = fault
        ask(capsys, server, target, data, "--retries", 2, "--concurrency", 4)
        assert server.paths["/v1/completions"] > 2 * COUNT + 8
    assert len(output(data)) == COUNT and all(len(record["conversations"]) == 4 for record in output(data))


def test_a_server_that_goes_away_ends_the_job_and_what_came_is_kept(capsys, target, encoder, data):
    with FakeServer(encoder) as server:

        def fault(number: int, body: dict[str, Any]) -> Fault | None:
            server.down = Fault(502, "bad gateway") if number >= 5 else None
            return server.down

        server.fault = fault
        said = ask(capsys, server, target, data, "--max_outage", 0.1, "--concurrency", 1, code=1)
        assert "does not answer: 502" in said and "run the same command again" in said and "--max_outage raises" in said
        assert not data.with_name("own.jsonl").exists()
        server.fault = lambda number, body: None
        server.down = None
        before = dict(server.asked)
        said = ask(capsys, server, target, data)
    assert "going on: 5 replies" in said
    assert sum(server.asked.values()) - sum(before.values()) == 2 * COUNT - 5
    assert len(output(data)) == COUNT


def test_of_two_servers_the_one_that_lives_does_it_all(capsys, target, encoder, data):
    with FakeServer(encoder) as one, FakeServer(encoder) as two:
        two.fault = lambda number, body: Fault()
        ask(capsys, one, target, data, "--server", two.url, "--concurrency", 4)  # not once is one of them to blame
        assert len(output(data)) == COUNT and sum(one.asked.values()) >= 2 * COUNT


@pytest.mark.parametrize(
    ("fault", "code", "told"),
    [
        (Fault(401, {"error": {"message": "no key"}}), 2, "answered 401: no key It wants a key"),
        (Fault(404, {"detail": "Not Found"}), 2, "answered 404: Not Found See that --server ends"),
        (Fault(400, {"error": {"message": "top_p is odd"}}), 2, "answered 400: top_p is odd Nothing that was asked"),
        (Fault(200, {"hello": "world"}), 1, "gave an answer of another form than OpenAI's"),
    ],
)
def test_what_no_second_try_would_change_stops_at_once(capsys, target, encoder, data, fault, code, told):
    with FakeServer(encoder, fault=lambda number, body: fault) as server:
        assert told in ask(capsys, server, target, data, "--concurrency", 1, code=code)
        assert server.number == 1


def test_a_server_that_is_down_or_has_other_models(capsys, target, encoder, data):
    with FakeServer(encoder, models=("a", "b")) as server:
        said = ask(capsys, server, target, data, code=2)
        assert "serves 2 models (a, b). Say with --served_model" in said
        assert "--served_model c" in ask(capsys, server, target, data, "--served_model", "c", code=2)
        assert ask(capsys, server, target, data, "--served_model", "b")
        assert {body["model"] for body in server.bodies} == {"b"}
    assert "does not answer" in ask(capsys, server, target, data, "--overwrite", code=1)


def test_another_tokenizer_or_template_is_refused_before_anything_is_asked(capsys, target, encoder, data):
    other = Encoder(encoder.tokenizer, encoder.template.replace("<|im_end|>", "<|endoftext|>"), "other")
    with FakeServer(other) as server:
        said = ask(capsys, server, target, data, code=2)
        assert "makes other tokens of a prompt" in said and "The first difference is token" in said
        assert not server.number
    with FakeServer(other, gives_ids=False) as server:  # as many tokens: nothing can be seen
        ask(capsys, server, target, data)
    longer = Encoder(byte_level_tokenizer(), encoder.template.replace("<|im_end|>", "<|im_end|>!"), "longer")
    with FakeServer(longer, gives_ids=False) as server:
        assert "another tokenizer or chat template" in ask(capsys, server, target, data, "--overwrite")


def test_a_prompt_that_the_server_changes_is_noticed(capsys, target, encoder, data):
    """A server that cuts prompts, before the first question or at any later one."""
    for number, code in ((-1, 2), (3, 1)):

        class Cutting(FakeServer):
            def _reply(self, path: str, body: dict[str, Any], prompt: list[int], at: int = number) -> dict[str, Any]:
                cut = path == "/v1/completions" and self.number > at
                return super()._reply(path, body, prompt[1:] if cut else prompt)

        with Cutting(encoder) as server:
            said = ask(capsys, server, target, data, "--concurrency", 1, "--overwrite", code=code)
        assert ("makes other tokens of a prompt" if code == 2 else "behind another prompt than the one") in said


@pytest.mark.parametrize("gives_ids", [True, False])
def test_the_templates_variables_are_told_to_the_server(capsys, target, encoder, data, gives_ids):
    template = encoder.template.replace("{%", "{% if thinking is defined and not thinking %}off {% endif %}{%", 1)
    file = data.with_name("thinking.jinja")
    file.write_text(template)
    given = ["--chat_template", file, "--chat_template_kwargs", '{"thinking": false}']
    with FakeServer(Encoder(encoder.tokenizer, template, "thinking"), gives_ids=gives_ids) as server:
        assert "another tokenizer or chat template" not in ask(capsys, server, target, data, *given)
    assert all(encoder.tokenizer.decode(record["input_ids"]).startswith("off ") for record in output(data))


def test_a_dated_job_goes_on_with_its_day(capsys, target, encoder, data):
    """What is trained has the day on which the job began; a server's own prompts, which are compared, have today's."""
    template = encoder.template.replace("{%", "{{ strftime_now('%Y-%m-%d') }}{%", 1)
    file = data.with_name("dated.jinja")
    file.write_text(template)
    with FakeServer(Encoder(encoder.tokenizer, template, "dated")) as server:
        server.fault = lambda number, body: Fault(502) if number >= 3 else None
        given = ["--chat_template", file, "--concurrency", 1, "--retries", 0]
        ask(capsys, server, target, data, *given, code=1)
        path = journal_path(data.with_name("own.jsonl"))
        header, *lines = path.read_bytes().splitlines(keepends=True)
        today = json.loads(header)["options"]["date"]
        path.write_bytes(b"".join([header.replace(today.encode(), b"2001-02-03"), *lines]))
        server.fault = lambda number, body: None
        assert "going on: 3 replies" in ask(capsys, server, target, data, *given)
    last = encoder.tokenizer.decode(output(data)[-1]["input_ids"])
    assert "2001-02-03" in last and today not in last


def test_a_journal_of_other_options_is_named(capsys, target, encoder, data):
    with FakeServer(encoder, fault=lambda number, body: Fault(502) if number >= 3 else None) as server:
        ask(capsys, server, target, data, "--retries", 0, "--concurrency", 1, code=1)
        server.fault = lambda number, body: None
        said = ask(capsys, server, target, data, "--temperature", 1, code=2)
        assert "asked for otherwise: temperature was 0.0, now 1.0" in said
        server.models = ("another",)
        assert "model was 'target', now 'another'" in ask(capsys, server, target, data, code=2)
        server.models = ("target",)
        ask(capsys, server, target, data)
        said = ask(capsys, server, target, data, "--max_new_tokens", 7, code=2)
        assert "exists. It was made otherwise: max_new_tokens was 1024, now 7" in said
        ask(capsys, server, target, data, "--max_new_tokens", 7, "--overwrite")


@pytest.mark.parametrize(
    ("more", "told"),
    [
        (["--max_new_tokens", "0"], "--max_new_tokens 0: expected 1 or more"),
        (["--temperature", "-1"], "--temperature -1.0: expected 0"),
        (["--server", "localhost:8000"], "--server localhost:8000: expected an address such as http://"),
        (["--server", "http://h/v1/chat/completions"], "without what comes behind the /v1"),
        (["--server", "http://h/v1", "--engine", "own"], "--engine own would do nothing"),
        (["--top_p", "0.5"], "--top_p 0.5 would do nothing: replies are greedy"),
        (["--served_model", "m"], "--served_model m would do nothing"),
        (["--engine", "vllm", "--engine_python", "/bin/sh"], "/bin/sh is no python that can be asked"),
    ],
)
def test_requests_that_are_wrong(target, data, more, told):
    with pytest.raises(RequestError, match=told.replace("(", r"\(")):
        main([*words(target, data), *more])


def test_a_python_without_vllm(target, data, tmp_path):
    python = tmp_path / "python"
    python.write_text("""#!/bin/sh\necho '{"version": null}'\n""")
    python.chmod(0o755)
    with pytest.raises(RequestError, match=r"--engine_python .* has no vLLM"):
        main([*words(target, data), "--engine", "vllm", "--engine_python", str(python)])
